"""Wrong answers to the exercises of notebook 05, as learners may write them, and a part of what each must be told."""

import torch


def adds_lengths(delta, share):
    S = torch.linalg.svdvals(delta)
    total, count = 0.0, 0
    while total < share * S.sum():
        total += S[count]
        count += 1
    return count


def stops_before(delta, share):
    _, S, _ = torch.linalg.svd(delta)
    e = (S**2).cumsum(0) / (S**2).sum()
    return len([x for x in e if x < share])


def smallest_first(delta, share):
    S2 = torch.linalg.eigvalsh(delta @ delta.T)  # ascending
    if len(S2) > min(delta.shape):
        S2 = S2[-min(delta.shape):]
    return int((S2.cumsum(0) / S2.sum() < share).sum()) + 1


def big_enough(delta, share):
    S = torch.linalg.svdvals(delta)
    return sum(1 for s in S if s >= (1 - share) * S.max())


def plain_rank(delta, share):
    return len([s for s in torch.linalg.svdvals(delta) if s > 1e-6])


def rooted(delta, share):
    S = torch.linalg.svdvals(delta)
    for r in range(1, len(S) + 1):
        if S[:r].norm() / S.norm() >= share:
            return r


def a_tensor_of_shares(delta, share):
    S = torch.linalg.svdvals(delta)
    return S.square().cumsum(0) / S.square().sum()


def raw_rows(A1, A2, i, j):
    return ((A1[:i] @ A2[:j].T).norm()**2 / min(i, j)).item()


def normalised_rows(A1, A2, i, j):
    A1, A2 = (torch.linalg.qr(A.T)[0].T for A in (A1, A2))
    return (torch.einsum("ad,bd->ab", A1[:i], A2[:j])**2).sum().item() / min(i, j)


def by_the_larger(A1, A2, i, j):
    U1, U2 = (torch.linalg.svd(A.T, full_matrices=False).U for A in (A1, A2))
    return (U1[:, :i].T @ U2[:, :j]).square().sum().item() / max(i, j)


def no_square(A1, A2, i, j):
    U1, U2 = (torch.linalg.svd(A.T, full_matrices=False).U for A in (A1, A2))
    return (torch.linalg.norm(U1[:, :i].T @ U2[:, :j]) / min(i, j)).item()


def not_divided(A1, A2, i, j):
    U1, U2 = (torch.linalg.svd(A.T, full_matrices=False).U for A in (A1, A2))
    return sum((U1[:, a] @ U2[:, b])**2 for a in range(i) for b in range(j)).item()


def left_vectors(A1, A2, i, j):
    U1, U2 = (torch.linalg.svd(A, full_matrices=False).U for A in (A1, A2))
    return ((U1[:, :i].T @ U2[:, :j]).norm()**2 / min(i, j)).item()


def all_of_W(W, delta, rank):
    return float(torch.linalg.norm(delta) / torch.linalg.norm(W))


def first_directions_only(W, delta, rank):
    U, S, V = torch.svd(delta)
    return float(torch.linalg.norm(S[:rank]) / torch.linalg.norm(U[:, :rank].T @ W @ V[:, :rank]))


def own_directions(W, delta, rank):
    U, S, Vh = torch.linalg.svd(W)
    return float(delta.norm() / torch.linalg.norm(U[:, :rank].T @ W @ Vh[:rank].T))


def one_sided(W, delta, rank):
    U = torch.linalg.svd(delta).U[:, :rank]
    return float(delta.norm() / (U @ U.T @ W).norm())


def turned_over(W, delta, rank):
    U, S, Vh = torch.linalg.svd(delta)
    return float((U[:, :rank].T @ W @ Vh[:rank].T).norm() / delta.norm())


def forgets_to_cut(W, delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (S.norm() / (U.T @ W @ Vh.T).norm()).item()


def forgets_to_transpose(W, delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (delta.norm() / (U[:, :rank].T @ W @ Vh[:, :rank]).norm()).item()


def signed(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0, full_matrices=False)[0], torch.linalg.svd(W, full_matrices=False)[0]
    count = 0
    for u in U[:, :k].T:
        count += max((U0.T @ u).tolist()) < epsilon
    return count


def only_the_first_k(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0).U[:, :k], torch.linalg.svd(W).U[:, :k]
    return ((U0.T @ U).abs().max(dim=0).values < epsilon).sum().item()


def in_place_order(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0).U, torch.linalg.svd(W).U
    return sum(abs(float(U0[:, i] @ U[:, i])) < epsilon for i in range(k))


def every_direction(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0, full_matrices=False).U, torch.linalg.svd(W, full_matrices=False).U
    return int(((U.T @ U0).abs().max(1).values < epsilon).sum())


def those_that_stayed(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0, full_matrices=False).U, torch.linalg.svd(W, full_matrices=False).U
    return sum(int((U0.T @ U[:, i]).abs().max() >= epsilon) for i in range(k))


def pairs(W0, W, k, epsilon):
    U0, U = torch.linalg.svd(W0, full_matrices=False).U, torch.linalg.svd(W, full_matrices=False).U
    return sum(abs(float(u @ u0)) < epsilon for u in U.T[:k] for u0 in U0.T)


def right_side(W0, W, k, epsilon):
    V0, V = torch.linalg.svd(W0, full_matrices=False).Vh, torch.linalg.svd(W, full_matrices=False).Vh
    return ((V0 @ V[:k].T).abs().max(0).values < epsilon).sum().item()


def without_the_scale(B, A, scale):
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, V = torch.svd(R_B @ R_A.T)
    return Q_B @ U, S, V.T @ Q_A.T


def qr_of_A_itself(B, A, scale):
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A)
    U, S, Vh = torch.linalg.svd(scale * R_B @ R_A, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A


def not_transposed(B, A, scale):
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(scale * (R_B @ R_A))
    return Q_B @ U, S, Vh @ Q_A.T


def the_middle_alone(B, A, scale):
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return torch.linalg.svd(scale * R_B @ R_A.mT)


def the_whole_product(B, A, scale):
    U, S, Vh = torch.linalg.svd(torch.mm(B, A) * scale, full_matrices=False)
    return U, S, Vh


def two_svds(B, A, scale):
    U, S_B, _ = torch.linalg.svd(B, full_matrices=False)
    _, S_A, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, scale * S_B * S_A, Vh


def gives_V(B, A, scale):
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, V = torch.svd(scale * R_B @ R_A.T)
    return Q_B @ U, S, Q_A @ V


def torch_svd_taken_for_linalg(B, A, scale):
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.svd(scale * R_B @ R_A.T)
    return Q_B @ U, S, Vh @ Q_A.T


WRONG = {
    "rank_for_energy": [
        (adds_lengths, "the energy is the sum of their squares"), (stops_before, "one too few"),
        (smallest_first, "starts with the smallest"), (big_enough, "compares each singular value with the largest"),
        (plain_rank, "this is the rank itself"), (rooted, "takes the root of the energy"),
        (a_tensor_of_shares, "expected")],
    "product_svd": [
        (without_the_scale, "the scale is missing"), (qr_of_A_itself, "take the QR of A.T"), (not_transposed, "the transpose of R_A"),
        (the_middle_alone, "in the middle: put Q_B in front"), (the_whole_product, "the whole product"),
        (two_svds, "['S'] is wrong"), (gives_V, "expected Vh"), (torch_svd_taken_for_linalg, "Vh of the middle is transposed")],
    "similarity": [
        (raw_rows, "not orthonormal"), (normalised_rows, "in the order of the rows"), (by_the_larger, "the smaller of"),
        (no_square, "the norm is squared"), (not_divided, "divide by min(i, j)"), (left_vectors, "raised")],
    "amplification_factor": [
        (all_of_W, "compares with all of W"), (first_directions_only, "the norm of all of delta"),
        (own_directions, "W's own top directions"), (one_sided, "on the left only"), (turned_over, "upside down"),
        (forgets_to_cut, "the first `rank` only"), (forgets_to_transpose, "raised RuntimeError")],
    "intruders": [
        (signed, "absolute value"), (only_the_first_k, "first k directions only"), (in_place_order, "place by place"),
        (every_direction, "take its first k"), (those_that_stayed, "not new"), (pairs, "pairs of directions"),
        (right_side, "the left ones, U")],
}
