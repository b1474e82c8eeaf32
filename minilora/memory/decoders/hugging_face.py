"""What the decoders of Hugging Face transformers share, line by line on the ledger; each family's own is in its file.

Sources: transformers 5, ``models/*/modeling_*.py`` and ``loss/loss_utils.py``.
Left out: position numbers and rotary frequencies, a few bytes a token.
"""

from .. import losses
from ..activations import ACTIVATIONS
from ..ledger import Tensor
from .decoder import Decoder
from .decoder import Matrices as Matrices

Step = tuple[str] | tuple[str, str]  # an operator as `Ops.unary` takes it: its name, and what it keeps
SCALED: tuple[Step, ...] = (("scaled scores",),)
SOFTCAP: tuple[Step, ...] = (("divided by the cap",), ("tanh", "output"), ("times the cap",))  # cap * tanh(x / cap)


class HuggingFaceDecoder(Decoder):
    """``AutoModelForCausalLM`` of the model's family: a norm before attention and MLP, LayerNorm unless said otherwise.

    Attributes:
        always_eager: the family has no fused attention. windows: of each mask that layers choose from, the field of
            the spec that says how far back a token sees ("": to the first).
        heads_first: q lies heads before tokens when attention sees it, and so then does a flash kernel's result.
        masks_apart: a mask of a window is made for each row apart.
        old_loss_in_fp32: its logits were made fp32 before transformers 4.50 too.
        score_steps: what becomes of the scores before the mask. logit_steps: of the logits.
    """

    always_eager = heads_first = masks_apart = False
    old_loss_in_fp32 = True
    windows: tuple[str, ...] = ("window",)
    score_steps: tuple[Step, ...] = SCALED
    logit_steps: tuple[Step, ...] = ()

    @property
    def eager(self) -> bool:
        return self.run.attention == "eager" or self.always_eager

    def whole_loss(self) -> Tensor:
        ops, run, software = self.ops, self.run, self.run.software
        y = self.decode()  # held by the model's output until the loss is there
        logits = self.head_of(y)
        with ops.inside("loss"):
            if software.shift == "logits":
                if not self.old_loss_in_fp32:
                    return losses.of_shifted_logits(ops, logits, run.batch, run.seq, self.spec.vocab,
                                                    run.kernels == "unsloth")
                logits = logits if software.keeps_logits else ops.cast(logits, 4)
                return losses.of_shifted_logits(ops, ops.cast(logits, 4), run.batch, run.seq, self.spec.vocab,
                                                run.kernels == "unsloth")
            wide = ops.cast(logits, 4)
            padded = ops.new(run.batch * (run.seq + 1), 8, "padded labels")
            shifted = padded if run.batch == 1 else ops.new(run.batch * run.seq, 8, "shifted labels")
            return ops.cross_entropy(wide, shifted)

    def chunked_loss(self, y: Tensor) -> Tensor:
        """TRL's; a streamed run has ours."""
        if self.run.streamed:
            return super().chunked_loss(y)
        with self.ops.inside("loss"):
            labels = Tensor(self.run.batch * (self.run.seq - 1), 8, self.targets.storage)
            return losses.chunked(self.ops, self.project(y, out=True), self.head, labels, self.spec.vocab)

    def fused_loss(self) -> Tensor:
        run = self.run
        y = self.project(self.decode(), out=True)
        with self.ops.inside("loss"):
            return losses.fused(self.ops, y, self.head, run.batch * (run.seq - 1), self.spec.vocab,
                                old=run.software.shift == "logits")

    def head_of(self, y: Tensor) -> Tensor:
        logits = super().head_of(self.project(y, out=True))
        with self.ops.inside("lm_head"):
            for step in self.logit_steps:
                logits = self.ops.unary(logits, *step)
        return logits

    # What stands before the layers

    def embed(self) -> list[Tensor]:
        ops, spec, run = self.ops, self.spec, self.run
        with ops.inside("embed_tokens"):
            x = self.scaled(ops.embedding(self.ids, self.embedding, spec.embedding))  # N C
            if run.checkpointing and ops.recording and run.method != "full" and run.software.peft:
                ops.require_grad(x)  # `enable_input_require_grads`, which PEFT asks for
            x = self.project(x)
        return self.positioned(x)

    def scaled(self, x: Tensor) -> Tensor:
        """The embedding as the layers want it."""
        return x

    def project(self, x: Tensor, out: bool = False) -> Tensor:
        """The way between the widths of the embedding and of the layers, where they differ (OPT-350M)."""
        if self.spec.embedding == self.spec.hidden:
            return x
        weight, width = self.projections[out], self.spec.embedding if out else self.spec.hidden
        return self.ops.linear(x, weight, width, what="projection")

    def positioned(self, x: Tensor) -> list[Tensor]:
        """x with its positions, and what the model's forward holds beside it."""
        return [x, x, self.ops.new(self.run.seq, 8, "position numbers")]

    def tables(self, x: Tensor) -> list:
        """What tells of positions, and the masks, None where attention needs none."""
        with self.ops.inside("positions"):
            return [*self.position_tables(x), *(self.mask(x, window) for window in self.windows)]

    def mask(self, x: Tensor, window: str) -> Tensor | None:
        """Of which token sees which (masking_utils.py). Fused attention needs none where rows are whole and a window,
        if there is one, is longer than they are."""
        ops, run = self.ops, self.run
        square, window_size = run.seq * run.seq, getattr(self.spec, window) if window else 0
        if self.eager:
            return ops.new(run.batch * square, x.width, "causal mask", part="activations")
        if run.attention == "flash" or run.rows == "equal" and not 0 < window_size <= run.seq:
            return None
        apart = run.rows != "equal" or self.masks_apart and window_size
        return ops.new(square * (run.batch if apart else 1), 1, "mask", part="activations")

    def position_tables(self, x: Tensor) -> list[Tensor]:
        return []

    # The block

    def norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        with self.ops.inside("norm"):
            return self.ops.layer_norm(x, *weights)

    def attention(self, x: Tensor, m: Matrices, tables: list[Tensor],
                  residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attention's output, and its weights if they were in memory: whoever holds them holds them on."""
        ops = self.ops
        q, k, v = self.queries_keys_values(x, m)
        with ops.inside("attention"):
            q, k = self.turned(q, k, tables)
            k, v = self.cached(k, v)
            y, weights = (self.eager_attention(q, k, v, tables[-1]) if self.eager
                          else (self.fused_attention(q, k, v, tables[-1]), None))
        y = self.ops.view(y)
        return self.finish(self.attended(y, m), residual), weights

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """With a mask, or heads that are too wide, keys and values are repeated (integrations/sdpa_attention.py)."""
        ops, run = self.ops, self.run
        if run.attention == "flash" and run.rows == "padded":  # modeling_flash_attention_utils.py, `_upad_input`
            q, k, v = (ops.unary(t, "rows without padding") for t in (q, k, v))
            return ops.unary(super().fused_attention(q, k, v), "with padding again")
        if run.attention != "flash" and q.count != k.count and (mask is not None or self.spec.head_dim > 256):
            k, v = (ops.unary(t, "repeated", count=q.count) for t in (k, v))
        kernel = self.kernel(q, k, mask) if run.attention != "flash" else "package"
        y = super().fused_attention(q, k, v, mask)
        if kernel == "plain" or kernel == "flash" and self.heads_first:
            return ops.copy(y, back=kernel == "plain")
        return y

    def attended(self, y: Tensor, m: Matrices) -> Tensor:
        """The heads' output through the attention's last matrix."""
        return m[self.spec.layout.out](y)

    def queries_keys_values(self, x: Tensor, m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def sizes_of_q_k_v(self, qkv: Tensor) -> list[int]:
        """Of their three parts in the output of one matrix."""
        q, kv = self.spec.heads * self.spec.head_dim, self.spec.kv_heads * self.spec.head_dim
        return [n * (qkv.count // (q + 2 * kv)) for n in (q, kv, kv)]

    def turned(self, q: Tensor, k: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        """q and k with rotary positions, if there are such."""
        return q, k

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """What a family does inside attention and MLP that others do around them: dropout, the residual sum."""
        return y

    def eager_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """With all scores in memory, their softmax in fp32. Returns its weights too."""
        ops, spec, run = self.ops, self.spec, self.run
        scores, width = run.batch * spec.heads * run.seq**2, q.width
        if spec.heads != spec.kv_heads:
            k, v = (ops.unary(t, "repeated", count=q.count) for t in (k, v))
            w = ops.bmm(ops.copy(q), k, scores, "scores")
        else:
            q, k = ops.copy(q), ops.copy(k)
            w = ops.bmm(q, k, scores, "scores")
        for step in self.score_steps:
            w = ops.unary(w, *step)
        w = ops.add(w, mask, "masked scores")
        w = ops.cast(self.softmax(w), width)
        w = ops.dropout(w, spec.attention_dropout)
        y = ops.bmm(w, v if spec.heads != spec.kv_heads else ops.copy(v), v.count, "output")
        return ops.copy(y, back=True), w

    def softmax(self, w: Tensor) -> Tensor:
        """In fp32, of a copy if need be."""
        return self.ops.unary(self.ops.cast(w, 4), "softmax", "output")

    def mlp(self, x: Tensor, m: Matrices, residual: Tensor | None = None) -> Tensor:
        """Up, activation, down."""
        f = self.spec.layout
        h = m[f.up[0]](x)
        h = self.activate(h)
        h = m[f.down](h)
        return self.finish(h, residual)

    def activate(self, x: Tensor) -> Tensor:
        with self.ops.inside("activation"):
            return ACTIVATIONS[self.spec.activation](self.ops, x)
