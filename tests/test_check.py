"""The exercise framework on toy exercises, then every exercise and prediction of the notebooks, found by itself."""

import copy
import pkgutil
import re
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora.check
from minilora.check import CheckFailed, Estimate, Exercise, Prediction


def merged(W, A, B, alpha):
    return W + alpha / A.shape[0] * B @ A


def matrices(seed):
    d_out, d_in, rank = 5 + seed, 9 - seed, 2 + seed
    return torch.randn(d_out, d_in), torch.randn(rank, d_in), torch.randn(d_out, rank), 8.0


TOY = Exercise(
    "merged", merged, matrices,
    [(lambda W, A, B, alpha: W + alpha * B @ A, "scaled by alpha, expected alpha / rank"),
     (lambda W, A, B, alpha: W + alpha / A.shape[0] * A @ B, "B comes first: (d_out, r) times (r, d_in)"),
     (lambda W, A, B, alpha: W.add_(alpha / A.shape[0] * B @ A), "W is frozen: do not add to it in place")])


def same_size(seed):
    return (torch.randn(3, 3),)


def message(exercise, function):
    with pytest.raises(CheckFailed) as failure:
        exercise(function)
    return str(failure.value)


def test_a_right_answer_prints_one_line(capsys):
    assert TOY(lambda W, A, B, alpha: print("rank", len(A)) or W + B @ A * (alpha / B.shape[1])) is None
    assert capsys.readouterr().out == "ok: merged is right on 24 fresh inputs\n"


def boom(W, A, B, alpha):
    return W / torch.zeros(3, 17)


def stub(W, A, B, alpha):
    raise NotImplementedError


def in_place(W, A, B, alpha):
    A *= alpha / A.shape[0]
    return W + B @ A


FAILURES = {
    "known mistake": (lambda W, A, B, alpha: W + B @ A * alpha, "scaled by alpha, expected alpha / rank"),
    "known mistake that raises": (lambda W, A, B, alpha: W + alpha / A.shape[0] * A @ B, "B comes first"),
    "known mistake in place": (lambda W, A, B, alpha: W.add_(B @ A, alpha=alpha / len(A)), "W is frozen"),
    "stub": (stub, "not written yet"),
    "ellipsis": (lambda W, A, B, alpha: ..., "not written yet"),
    "exception": (boom, r"raised RuntimeError: .*, at `return W / torch.zeros\(3, 17\)`"),
    "too few parameters": (lambda W, A: W, "raised TypeError: .*takes 2 positional arguments"),
    "returns None": (lambda *a: print("learner's own\nprint"),
                     "returns None; is the return missing\\?; you printed: learner's own print$"),
    "known mistake that prints": (lambda W, A, B, alpha: print("x" * 300) or W + B @ A * alpha,
                                  r"expected alpha / rank; you printed: x{197}\.\.\.$"),
    "exception after a print": (lambda W, A, B, alpha: print("rank", len(A)) or 1 / 0, ".*; you printed: rank 2$"),
    "generator": (lambda *a: (row for row in merged(*a)), "merged returns a generator; expected Tensor$"),
    "shape": (lambda *a: merged(*a)[1:], r"has shape \(4, 9\), expected \(5, 9\)"),
    "dtype": (lambda *a: merged(*a).half(), "of dtype float16, expected float32"),
    "type": (lambda *a: merged(*a).tolist(), r"\(list\), expected a tensor of shape \(5, 9\)"),
    "argument in place": (in_place, "changes its argument A in place"),
    "constant": (lambda *a: 7.0, "does not depend on its input"),
    "factor": (lambda *a: -2 * merged(*a), "is -2 times what is expected"),
    "entries": (lambda *a: torch.eye(*a[0].shape) + merged(*a), r"wrong in 5 of 45 entries: at \[0, 0\] it is"),
    "not finite": (lambda *a: merged(*a) / 0, "entries that are not finite"),
    "not a function": (merged(*matrices(0)), "hand over the function merged itself"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_each_failure_is_named_on_one_line(failure, capsys):
    function, expected = FAILURES[failure]
    text = message(TOY, function)
    assert re.match("not yet: .*" + expected, text) and "\n" not in text
    assert capsys.readouterr() == ("", "")  # nothing that the learner's function prints gets in between


def test_a_transposed_result_is_named():
    toy = Exercise("double", lambda x: 2 * x, same_size, [])
    assert "is transposed" in message(toy, lambda x: 2 * x.T)


def test_a_function_that_should_raise():
    def strict(seed):
        raise ValueError("rank 0")

    toy = Exercise("strict", strict, lambda seed: (seed,), [])
    assert "returned 3, expected ValueError: rank 0" in message(toy, lambda seed: 3)
    assert "raised KeyError" in message(toy, lambda seed: {}[seed])
    toy(strict)


def test_containers_numbers_and_words():
    toy = Exercise("count", lambda x: {"sizes": list(x.shape), "share": 0.25 * len(x), "name": f"n{len(x)}"},
                   lambda seed: (torch.randn(seed + 2, 3),), [])
    right = toy.reference
    toy(lambda x: {"name": f"n{len(x)}", "share": torch.tensor(len(x) / 4), "sizes": tuple(x.shape)})
    assert "the result['sizes'] has 1 entries, expected 2" in message(toy, lambda x: right(x) | {"sizes": [len(x)]})
    assert "the result['sizes'][1] is 4, expected 3" in message(toy, lambda x: right(x) | {"sizes": [len(x), 4]})
    assert ("the result['sizes'][0] is a decimal number (2.0), expected a whole one: use // or int()"
            in message(toy, lambda x: right(x) | {"sizes": [float(len(x)), 3]}))
    assert "the result['share'] is 1, expected 0.5" in message(toy, lambda x: right(x) | {"share": len(x) / 2})
    assert "the result['name'] is 'n', expected 'n2'" in message(toy, lambda x: right(x) | {"name": "n"})
    assert "has the keys ['a'], expected ['sizes', 'share', 'name']" in message(toy, lambda x: {"a": len(x)})


def test_a_word_for_a_number_and_a_generator_for_a_list():
    toy = Exercise("double", lambda n: 2 * n, lambda seed: (3056 + seed,), [])
    assert "double(3056) is '6112' (str), expected 6112 (int)" in message(toy, lambda n: str(2 * n))
    toy = Exercise("upto", lambda n: list(range(n)), lambda seed: (seed,), [])
    for lazy in (lambda n: (i for i in range(n)), lambda n: map(int, range(n)), lambda n: filter(None, range(n))):
        assert message(toy, lazy) == "not yet: upto returns a generator; put list(...) around it"


def test_the_failing_call_is_shown_where_it_is_short():
    toy = Exercise("total", lambda sizes, names: len(names) * sum(sizes), lambda seed: ([seed, 2], ("a", None)), [])
    assert "total([0, 2], ('a', None)) is 2, expected 4" in message(toy, lambda sizes, names: sum(sizes))
    long = replace(toy, inputs=lambda seed: ([seed] * 50, ("a", None)))
    assert "the result is 50, expected 100" in message(long, lambda sizes, names: sum(sizes))


def test_what_an_exercise_observes_is_called_by_its_name():
    toy = Exercise("pair", lambda x: x, lambda seed: (seed,), [], observe=lambda result, x: {"the outputs": [result]})
    assert "not yet: the outputs[0] is 1, expected 0" in message(toy, lambda x: x + 1)


def test_modules_changed_on_purpose_and_by_accident():
    def freeze(model):
        model.requires_grad_(False)

    toy = Exercise("freeze", freeze, lambda seed: (nn.Linear(2, 2 + seed),), [], in_place=True,
                   observe=lambda result, model: [p.requires_grad for p in model.parameters()])
    toy(freeze)
    assert "the result[1] is True, expected False" in message(toy, lambda model: model.weight.requires_grad_(False))
    looks = Exercise("width", lambda model: model.out_features, toy.inputs, [])
    assert "changes its argument model" in message(looks, lambda model: model.requires_grad_(False).out_features)


def test_a_mistake_must_agree_on_every_input():
    toy = Exercise("double", lambda n: 2 * n, lambda seed: (seed + 2,), [(lambda n: n * n, "that is the square")])
    assert "square" in message(toy, lambda n: n**2)
    assert "double(3) is 9, expected 6" in message(toy, lambda n: 4 if n == 2 else 9)


def test_whole_numbers_agree_exactly_and_floats_within_the_tolerance():
    whole = Exercise("count", lambda n: n + 10**9, lambda seed: (seed,), [], tolerance=0.1)
    assert "count(0) is 1000000001, expected 1000000000" in message(whole, lambda n: n + 10**9 + 1)
    share = Exercise("share", lambda x: x / 3, same_size, [], tolerance=1e-3)
    share(lambda x: x / 3.0001)
    assert "times what is expected" in message(share, lambda x: x / 3.01)


def test_the_random_state_of_the_notebook_is_left_alone():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    TOY(merged)
    assert torch.equal(torch.randn(2), expected)


def test_jupyter_and_nbgrader_see_one_line_and_a_failure():
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    from nbgrader.utils import determine_grade

    source = "from minilora.check import Exercise\nExercise('one', lambda n: n, lambda seed: (seed,), [])(lambda n: {})"
    meta = {"nbgrader": dict(schema_version=3, grade=True, solution=False, locked=True, points=1, grade_id="a")}
    cells = [new_code_cell(source.format(answer), metadata=meta) for answer in ("n + 1", "n")]
    NotebookClient(new_notebook(cells=cells), allow_errors=True, kernel_name="python3").execute()
    (wrong,), (right,) = cells[0].outputs, cells[1].outputs
    assert wrong.traceback == [f"not yet: {wrong.evalue.removeprefix('not yet: ')}"] and wrong.ename == "CheckFailed"
    assert right.text == "ok: one is right on 24 fresh inputs\n"
    assert [determine_grade(cell) for cell in cells] == [(0, 1), (1, 1)]


CHOICE = Prediction("b", {"a": "Only A has a factor of zero.", "b": "B is zero, so A waits.",
                          "c": "Look at the factor B."})


def test_a_prediction_answers_the_guess(capsys):
    CHOICE.reveal("c")
    assert capsys.readouterr().out == "c: not so. Look at the factor B.\nb: right. B is zero, so A waits.\n"
    CHOICE.reveal("b")
    assert capsys.readouterr().out == "b: right. B is zero, so A waits.\n"
    CHOICE.reveal(None)
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["a", "c", "b"]
    CHOICE.reveal(" B ")
    assert capsys.readouterr().out == "b: right. B is zero, so A waits.\n"
    for guess, shown in (("x", "'x'"), (["b"], r"\['b'\]"), (torch.zeros(9, 9), "tensor.*"), (2, "2"), ("", "''")):
        with pytest.raises(CheckFailed, match=f"^not yet: the guess is {shown}, expected one of a, b, c$"):
            CHOICE.reveal(guess)


def test_an_estimate_answers_the_guess(capsys):
    estimate = Estimate([(0.25, "These are the weights alone.")])
    for guess, said in ((95, "right: your guess is within a factor of 1.5"),
                        (26, "1/3.8 of the measured value. These are"),
                        (300, "not so: your guess is 3 times the measured"), (None, "about 0.25 times")):
        estimate.reveal(guess, 100)
        assert re.match(".*" + said, capsys.readouterr().out)
    with pytest.raises(CheckFailed, match="the guess is -1, expected a number above 0"):
        estimate.reveal(-1, 100)
    for guess in (2.8e12, 350e9, 1.2e12):  # the right answer, the weights and the paper's number, in bytes
        FOUND["nb01.gpt3_gigabytes"][1].reveal(guess, 2794)
        assert "Is that in bytes? The question" in capsys.readouterr().out


# Every exercise of every notebook.

MODULES = [import_module(f"minilora.check.{m.name}") for m in pkgutil.iter_modules(minilora.check.__path__)
           if m.name.startswith("nb")]
FOUND = {f"{m.__name__[-4:]}.{name}": (name, value) for m in MODULES for name, value in vars(m).items()
         if isinstance(value, (Exercise, Prediction, Estimate))}
EXERCISES = {k: v for k, (_, v) in FOUND.items() if isinstance(v, Exercise)} | {"toy": TOY}
PREDICTIONS = {k: v for k, (_, v) in FOUND.items() if isinstance(v, Prediction)} | {"toy": CHOICE}
each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)


def test_exercises_bear_the_names_they_are_called_by():
    assert all(e.name == name for name, e in FOUND.values() if isinstance(e, Exercise))


@each_exercise
def test_the_reference_is_right_and_its_inputs_are_reproducible(exercise):
    assert exercise.diagnose(exercise.reference) is None
    outcomes = exercise.outcomes(exercise.reference)
    assert not any(o.changed or o.error and not isinstance(o.error, ValueError) for o in outcomes)


@each_exercise
def test_each_mistake_is_told_its_own_message(exercise):
    messages = [text for _, text in exercise.mistakes]
    assert len(set(messages)) == len(messages) >= 3 and not any("\n" in text for text in messages)
    assert [exercise.diagnose(mistake) for mistake, _ in exercise.mistakes] == messages


def first_tensor(value):
    return next((v for v in value if isinstance(v, torch.Tensor) and v.numel()), None)


@each_exercise
def test_the_failures_common_to_all_are_named(exercise):
    reference, seen = exercise.reference, []

    def crash(*arguments):
        raise ZeroDivisionError("by my own doing")

    def constant(*arguments):
        seen.append(reference(*arguments))
        return seen[0]

    def nothing(*arguments):
        return None

    assert re.search("raised ZeroDivisionError: by my own doing, at `raise", exercise.diagnose(crash))
    assert "not written yet" in exercise.diagnose(stub_of_any)
    assert exercise.diagnose(nothing) is not None
    if exercise.in_place or exercise.observe:
        return
    assert "returns None" in exercise.diagnose(nothing)
    assert exercise.diagnose(constant) in {f"the result of {exercise.name} does not depend on its input",
                                           *(text for _, text in exercise.mistakes)}
    result = reference(*exercise.inputs(0))
    if isinstance(result, torch.Tensor) and result.ndim:
        assert "has shape" in exercise.diagnose(lambda *a: reference(*a)[None])
        assert "of dtype" in exercise.diagnose(lambda *a: reference(*a).half())
    if first_tensor(exercise.inputs(0)) is not None:
        def spoil(*arguments):
            result = reference(*arguments)
            first_tensor(arguments).zero_()
            return result
        assert "in place" in exercise.diagnose(spoil)


def stub_of_any(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_every_choice_of_a_prediction_has_its_own_answer(prediction):
    answers = list(prediction.answers.values())
    assert prediction.right in prediction.answers and len(answers) >= 3
    assert len(set(answers)) == len(answers) and all(len(a) > 10 for a in answers)


# Answers as learners write them, apart from the checkers' own tables: wrong ones in wrong_answers/nbNN.py and slips.py,
# right ones in unusual form in unusual.py.

WRONG = {f"{path.stem}.{name}": list(answers)
         for path in sorted((Path(__file__).parent / "wrong_answers").glob("nb*.py"))
         for name, answers in import_module(f"wrong_answers.{path.stem}").WRONG.items()}
for key, answers in import_module("wrong_answers.slips").SLIPS.items():
    WRONG.setdefault(key, []).extend(answers)
RIGHT = import_module("wrong_answers.unusual").RIGHT
NUMBERS_ALONE = re.compile(r"^(?!wrong where)[^:]*(\bis (wrong in|[^(]*, expected)|has shape|has \d+ entries|not finite)")


def test_every_exercise_has_wrong_answers_and_right_ones():
    assert set(WRONG) == set(RIGHT) == set(EXERCISES) - {"toy"}
    assert min(map(len, WRONG.values())) >= 6 and min(map(len, RIGHT.values())) >= 3
    assert sum(map(len, [*WRONG.values(), *RIGHT.values()])) >= 500


@cache
def told(key):
    return [EXERCISES[key].diagnose(answer) for answer, _ in WRONG[key]]


@pytest.mark.parametrize("key", WRONG)
def test_each_wrong_answer_is_told_what_is_wrong(key):
    assert all(text and part in text for text, (_, part) in zip(told(key), WRONG[key])), told(key)


def test_four_in_five_wrong_answers_are_told_a_cause():
    texts = [text for key in WRONG for text in told(key)]
    bare = [text for text in texts if NUMBERS_ALONE.match(text)]
    assert len(bare) <= 0.2 * len(texts), bare


@pytest.mark.parametrize("key", RIGHT)
def test_each_right_answer_in_unusual_form_is_accepted(key):
    assert [EXERCISES[key].diagnose(answer) for answer in RIGHT[key]] == [None] * len(RIGHT[key])


def test_wrap_is_told_of_its_return_and_of_loose_names_whatever_else_it_does():
    diagnose, wrong = EXERCISES["nb03.wrap"].diagnose, import_module("wrong_answers.nb03")
    for other in (wrong.same, wrong.not_frozen, wrong.top_level_only, wrong.by_its_name):
        assert "wrap must return the model" in diagnose(lambda *arguments: other(*arguments) and 5)
        assert "not a copy of it" in diagnose(lambda model, *rest: other(copy.deepcopy(model), *rest))
    for loose in (str.startswith, str.endswith, str.__contains__):
        assert "compare whole names" in diagnose(wrong.walk(loose))


def test_a_dull_table_of_mistakes_would_be_caught():
    same = replace(TOY, mistakes=[TOY.mistakes[0], (TOY.mistakes[0][0], "another"), TOY.mistakes[1]])
    with pytest.raises(AssertionError):
        test_each_mistake_is_told_its_own_message(same)
