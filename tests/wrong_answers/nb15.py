"""Wrong answers to the exercises of notebook 15, as learners may write them, and a part of what each must be told."""


def not_shifted(ids, trained):
    return [token if on else -100 for token, on in zip(ids, trained)]


def last_cut(ids, trained):
    return not_shifted(ids, trained)[:-1]


def mark_of_this_place(ids, trained):
    return [ids[i + 1] if trained[i] else -100 for i in range(len(ids) - 1)]


def turned_round(ids, trained):
    return [-100 if trained[i] else ids[i] for i in range(1, len(ids))]


def zeros(ids, trained):
    return [ids[i] * trained[i] for i in range(1, len(ids))]


def everything(ids, trained):
    return ids[1:]


def only_counted(ids, trained):
    return [ids[i] for i in range(1, len(ids)) if trained[i]]


def one_more(ids, trained):
    return [ids[i] if trained[i] else -100 for i in range(1, len(ids))] + [-100]


def constant(width, method):
    return 3e-3 if method == "lora" else 6e-4


def no_fifth(width, method):
    return 3e-3 * (160 / width) ** 0.78


def times_five(width, method):
    return no_fifth(width, method) * (5 if method == "full" else 1)


def upside_down(width, method):
    return 3e-3 * (width / 160) ** 0.78 * (0.2 if method == "full" else 1)


def no_power(width, method):
    return 3e-3 * (160 / width) * (0.2 if method == "full" else 1)


def tenth(width, method):
    return no_fifth(width, method) * (0.1 if method == "full" else 1)


def seconds(tokens, epochs, speed, watts, price):
    s = tokens * epochs / speed
    return s, s * watts / 1000 * price


def one_epoch(tokens, epochs, speed, watts, price):
    h = tokens / speed / 3600
    return h, h * watts / 1000 * price


def in_watts(tokens, epochs, speed, watts, price):
    h = tokens * epochs / speed / 3600
    return h, h * watts * price


def minutes(tokens, epochs, speed, watts, price):
    m = tokens * epochs / speed / 60
    return m, m * watts / 1000 * price


def without_power(tokens, epochs, speed, watts, price):
    h = tokens * epochs / speed / 3600
    return h, h * price


def multiplied(tokens, epochs, speed, watts, price):
    h = tokens * epochs * speed / 3600
    return h, h * watts / 1000 * price


def hours_alone(tokens, epochs, speed, watts, price):
    return tokens * epochs / speed / 3600


WRONG = {
    "next_targets": [
        (not_shifted, "tokens themselves"), (last_cut, "the token after it"), (mark_of_this_place, "next token as well"),
        (turned_round, "other way round"), (zeros, "-100"), (everything, "mask with -100"),
        (only_counted, "at their places"), (one_more, "one too many")],
    "rate_for": [
        (constant, "same at every width"), (no_fifth, "takes a fifth"), (times_five, "wrong way"),
        (upside_down, "grows with the width"), (no_power, "the power is missing"), (tenth, "published factor")],
    "cost_of": [
        (seconds, "an hour has 3,600"), (one_epoch, "one epoch"), (in_watts, "divide by 1,000"), (minutes, "minutes"),
        (without_power, "the power is missing"), (multiplied, "multiplies"), (hours_alone, "both are wanted")],
}
