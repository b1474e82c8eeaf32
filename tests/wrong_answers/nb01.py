"""Wrong answers to the exercises of notebook 01, as learners may write them, and a part of what each must be told."""


def as_if_all_trained(parameters, trainable):
    return parameters * (4 + 4 + 8)


def trained_alone(parameters, trainable):
    return trainable * (4 + 4 + 8)


def plain_sgd(parameters, trainable):
    weights, gradients = 4 * parameters, 4 * trainable
    return weights + gradients


def one_moment(parameters, trainable):
    return 4 * parameters + (4 + 4) * trainable


def added_to_the_frozen(parameters, trainable):
    frozen = 4 * parameters
    return frozen + 16 * trainable


def numbers(parameters, trainable):
    return parameters + 3 * trainable


def shared_out(parameters, trainable):
    return 4 * parameters + trainable * 24 / 2


def in_words(parameters, trainable):
    return f"{4 * (parameters + 3 * trainable)}"


def every_width(widths, trains):
    kept = 0
    for width in widths:
        kept += width
    return kept


def every_input(widths, trains):
    return sum(widths) - widths[-1]


def all_above_the_first(widths, trains):
    kept, open = 0, False
    for width, train in zip(widths, trains):
        open = open or train
        kept += width * open
    return kept


def outputs(widths, trains):
    return sum(widths[i + 1] for i, train in enumerate(trains) if train)


def whole_weights(widths, trains):
    return sum(widths[i] * widths[i + 1] for i in range(len(trains)) if trains[i])


def frozen_ones(widths, trains):
    return sum(width for width, train in zip(widths, trains) if not train)


def in_bytes(widths, trains):
    return sum(4 * widths[i] for i in range(len(trains)) if trains[i])


def size_of_the_gradients(trainable, workers):
    return trainable * 4


def to_every_other(trainable, workers):
    return sum(4 * trainable for worker in range(workers) if worker)


def only_summed(trainable, workers):
    chunk = trainable / workers
    return 4 * chunk * (workers - 1)


def a_round_too_many(trainable, workers):
    chunk = 4 * trainable / workers
    return 2 * workers * chunk


def floats(trainable, workers):
    return 2 * (workers - 1) * trainable / workers


def all_workers(trainable, workers):
    chunk = 4 * trainable / workers
    return workers * 2 * (workers - 1) * chunk


WRONG = {
    "state_bytes": [
        (as_if_all_trained, "a frozen weight has no gradient"), (trained_alone, "the frozen weights are missing"),
        (plain_sgd, "Adam's two moments are not"), (one_moment, "one number too few"),
        (added_to_the_frozen, "counted twice"), (numbers, "in fp32 each takes 4 bytes"),
        (shared_out, ") is a decimal number ("), (in_words, "' (str), expected ")],
    "kept_floats": [
        (every_width, "not an input of any layer"), (every_input, "a frozen layer keeps no input"),
        (all_above_the_first, "above the first layer that trains"),
        (outputs, "these are the outputs"), (whole_weights, "these are the weights"),
        (frozen_ones, "the wrong way round"), (in_bytes, "these are bytes")],
    "ring_bytes": [
        (size_of_the_gradients, "this is the size of the gradients"), (to_every_other, "to every other worker"),
        (only_summed, "the first half"), (a_round_too_many, "workers - 1 rounds"),
        (floats, "this counts numbers"), (all_workers, "what all workers send together")],
}
