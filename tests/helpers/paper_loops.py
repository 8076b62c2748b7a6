"""The formulas of 2024-2026 as their papers print them: Python floats, one token at a time, and no tensor.

p is the teacher, q the student, a row holds one position's logits. What a paper detaches stays an argument of its own
here (`frozen`), so that a finite difference in the student's logits moves only what has a gradient. -inf is an absent
token. Where an author's code and paper differ, the function says so.
"""

import math

Row = list[float]


def softmax(logits: Row) -> Row:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def kl(a: Row, b: Row) -> float:
    return math.fsum(a[v] * math.log(a[v] / b[v]) for v in range(len(a)) if a[v] > 0)


def entropy(p: Row) -> float:
    return -math.fsum(p[v] * math.log(p[v]) for v in range(len(p)) if p[v] > 0)


def taid(student: Row, teacher: Row, frozen: Row, *, t: float) -> float:
    """KL(p_t || q) with p_t = softmax((1 - t) sg z_q + t z_p): TAID (2501.16937).

    The authors' `taid.py` leaves out p_t's entropy: the same gradient, another value.
    """
    target = softmax([_mixed(1 - t, frozen[v], t, teacher[v]) for v in range(len(teacher))])
    return kl(target, softmax(student))


def taid_schedule(
    losses: Row, *, steps: int, start: float, end: float, rate: float, momentum: float, late: int = 0
) -> Row:
    """t of each step, given each step's loss: TAID's adaptive update, run behind a step's loss.

    The first step only remembers its loss. No later t is below the line from `start` to `end`. In the authors'
    `update_t` that line is one step `late`, and the loss is the cross-entropy, not the KL.
    """
    t, before, trend, used = start, math.inf, 0.0, []
    for k, loss in enumerate(losses):
        t = min(end, max(start + (end - start) * max(k - late, 0) / steps, t))
        used.append(t)
        if not math.isinf(before):
            trend = momentum * trend + (1 - momentum) * (before - loss) / (before + 1e-15)
            t += rate / (1 + math.exp(-trend)) * (1 - t)
        before = loss
    return used


def veto(student: Row, teacher: Row, frozen: Row, *, beta: float, direction: str) -> float:
    """KL(Q || q) or KL(q || Q) with Q ∝ exp(z_p + β sg z_q): Veto (2601.07155), Algorithm 1.

    Theorem 3's advantage -log p + (1 - β) log q is the gradient of KL(q || Q) only where Q is detached.
    """
    target = softmax([_mixed(1.0, teacher[v], beta, frozen[v]) for v in range(len(teacher))])
    q = softmax(student)
    return kl(target, q) if direction == "forward" else kl(q, target)


def veto_decay(start: float, step: int, steps: int) -> float:
    """β_i = β (1 - i / N): Veto, Algorithm 1."""
    return start * (1 - step / steps)


def alpha_beta(student: Row, teacher: Row, *, alpha: float, beta: float) -> float:
    """D^(α, β)(p || q): ABKD (2505.04560). Its limits at α = 0, β = 0 and α + β = 0 are those of the general line.

    The authors' `ab_div` divides those three by β, α and α where the limits have β², α² and α²: the same at 1.
    """
    p, q = softmax(teacher), softmax(student)
    total = 0.0
    for v in range(len(p)):
        if p[v] == 0 and q[v] == 0:
            continue
        if alpha == 0 and beta == 0:
            term = 0.5 * (math.log(p[v]) - math.log(q[v])) ** 2
        elif alpha == 0:
            term = (q[v] ** beta * math.log(q[v] ** beta / p[v] ** beta) - q[v] ** beta + p[v] ** beta) / beta**2
        elif beta == 0:
            term = (p[v] ** alpha * math.log(p[v] ** alpha / q[v] ** alpha) - p[v] ** alpha + q[v] ** alpha) / alpha**2
        elif alpha + beta == 0:
            term = (math.log(q[v] ** alpha / p[v] ** alpha) + (p[v] / q[v]) ** alpha - 1) / alpha**2
        else:
            both = alpha + beta
            term = p[v] ** alpha * q[v] ** beta - alpha / both * p[v] ** both - beta / both * q[v] ** both
            term /= -alpha * beta
        total += term
    return total


def entropy_aware_kl(student: Row, teacher: Row, *, threshold: float) -> float:
    """KL(q || p) + [H(p) > τ] KL(p || q): entropy-aware OPD (2603.07079), L_OPD + 1[H > τ] L_FKL.

    The authors' code has the sampled token's estimate in the place of KL(q || p), and the teacher's top K in the other.
    """
    p, q = softmax(teacher), softmax(student)
    return kl(q, p) + (kl(p, q) if entropy(p) > threshold else 0.0)


def todi(student: Row, teacher: Row, frozen: Row) -> float:
    """Σ_v w_v p_v log(p_v/q_v) + (1 - w_v) q_v log(q_v/p_v), w_v = sg σ(log p_v/q_v): ToDi (2505.16297)."""
    p, q, q_frozen = softmax(teacher), softmax(student), softmax(frozen)
    total = 0.0
    for v in range(len(p)):
        if p[v] == 0 and q[v] == 0:
            continue
        share = 1 / (1 + q_frozen[v] / p[v])  # the sigmoid of a log-ratio
        total += share * p[v] * math.log(p[v] / q[v]) + (1 - share) * q[v] * math.log(q[v] / p[v])
    return total


def concrete_score(student: Row, teacher: Row, frozen: Row, *, weights: str = "student") -> float:
    """½ Σ_y Σ_x sg[w(y) q(x)] (z_q[x] - z_q[y] - z_p[x] + z_p[y])²: CSD (2509.25837), Eq. 8, w = q, p or 1/V.

    The authors' `csd` and `csd_weighting_function` have half of this gradient. For w = q that half is the gradient of
    the reverse KL, to the letter.
    """
    q, p = softmax(frozen), softmax(teacher)
    uniform = [float(chance > 0) / sum(chance > 0 for chance in p) for chance in p]
    w = {"student": q, "teacher": p, "uniform": uniform}[weights]
    total = 0.0
    for y in range(len(student)):
        for x in range(len(student)):
            if w[y] > 0 and q[x] > 0:
                total += 0.5 * w[y] * q[x] * (student[x] - student[y] - teacher[x] + teacher[y]) ** 2
    return total


def concrete_score_gradient(student: Row, teacher: Row) -> Row:
    """q_v (d_v - Σ_u q_u d_u), d = z_q - z_p: the gradient of the authors' `csd`."""
    q = softmax(student)
    gaps = [student[v] - teacher[v] for v in range(len(q))]
    mean = math.fsum(q[v] * gaps[v] for v in range(len(q)))
    return [q[v] * (gaps[v] - mean) for v in range(len(q))]


def on_policy_gradient(student: Row, teacher: Row, frozen: Row, token: int) -> float:
    """-(log p(y) - log sg q(y)) log q(y): tinker-cookbook, `incorporate_kl_penalty`, its advantage times log q."""
    p, q, q_frozen = softmax(teacher), softmax(student), softmax(frozen)
    return -(math.log(p[token]) - math.log(q_frozen[token])) * math.log(q[token])


def distillm2_skew(log_p: Row, log_q: Row, *, base: float, mean: float) -> float:
    """α of one response: clip(1 - (1 - α0) m / (e^{mean log p} - e^{mean log q} + 1e-5), 0.01, α0).

    `get_batch_logps` of DistiLLM-2 (2503.07067): `log_p` and `log_q` are the response's tokens under teacher and
    student; for a student's response the two change places.
    """
    gap = math.exp(math.fsum(log_p) / len(log_p)) - math.exp(math.fsum(log_q) / len(log_q))
    return min(base, max(0.01, 1 - (1 - base) * mean / (gap + 1e-5)))


def distillm2_teacher(student: Row, teacher: Row, *, alpha: float) -> float:
    """KL(p || α p + (1 - α) q), on the teacher's responses; the gradient passes through both places of q."""
    p, q = softmax(teacher), softmax(student)
    return kl(p, [alpha * p[v] + (1 - alpha) * q[v] for v in range(len(p))])


def distillm2_student(student: Row, teacher: Row, frozen: Row, *, alpha: float) -> float:
    """KL(q || (1 - α) p + α sg q), on the student's responses: the code detaches the mixture's student."""
    p, q, q_frozen = softmax(teacher), softmax(student), softmax(frozen)
    return kl(q, [(1 - alpha) * p[v] + alpha * q_frozen[v] for v in range(len(p))])


def distillm2_beta(step: int, steps: int) -> float:
    """β = 1 + ½ min(1, 2 step / steps), of (2 - β) L_teacher + β L_student."""
    return 1 + 0.5 * min(1.0, 2 * step / steps)


def skd_distribution(student: Row, teacher: Row, *, top: int) -> Row:
    """Of one token: y ~ q, kept if among the teacher's `top` tokens, else y ~ p: SKD (2410.11325), Algorithm 1."""
    p, q = softmax(teacher), softmax(student)
    kept = set(sorted(range(len(p)), key=lambda v: -p[v])[:top])
    chance = [0.0] * len(p)
    for proposal in range(len(p)):
        if proposal in kept:
            chance[proposal] += q[proposal]
            continue
        for drawn in range(len(p)):
            chance[drawn] += q[proposal] * p[drawn]
    return chance


def _mixed(weight_a: float, a: float, weight_b: float, b: float) -> float:
    """A weighted sum of two logits, in which a weight of 0 silences an absent token."""
    return (weight_a * a if weight_a else 0.0) + (weight_b * b if weight_b else 0.0)
