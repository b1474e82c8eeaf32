from minilora import LoRAConfig, inject, merge, report, save_adapter
from minilora.helpdesk import answer, batches, load_base, load_task
from minilora.train import train

model = inject(load_base(), LoRAConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj")))
print(report(model))                    # what trains; the outputs are still the base's, bit for bit
train(model, batches(load_task("tone").train, 32), steps=150, lr=1e-2)
print(answer(model, "hello , my lamp k4827 is late ."))
save_adapter(model, "my_adapter")       # PEFT's format, 82 KB
merge(model)                            # W + s B A, rounded once; unmerge(model) gives W back bit for bit
