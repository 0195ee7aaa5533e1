"""The claims about expert routing and importance ratios, in the order of the argument, and what would show each.

Bands ask for the shape of a law (a slope near 2, not 1), never for a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.judge.verdict import Claim, Estimates, Finding, Judge, all_at_most, apart, at_most, largest_n, rising, within


@dataclass(frozen=True)
class Step:
    """One step of the argument: what it says, how its numbers are read, and what they do not say."""

    title: str
    says: str
    reads: str
    beware: str


STEPS = (
    Step(
        "Experts change when the weights do",
        "The same tokens, scored by the old and the new policy, do not go to the same experts. A router takes the "
        "top-k of its scores; where the last chosen and the first rejected score are close, a small step swaps them.",
        "A flip is counted in four ways: replaced experts, changed sets of a (token, layer), tokens with any change, "
        "layers a token. The margin is the gap between the last chosen and the first rejected score. While no score "
        "moves by half the margin, the set cannot change: that is a theorem, and its violations must be 0.",
        "Counts of different definitions differ by a factor of ten. A flip is a property of the new model, not an "
        "error.",
    ),
    Step(
        "A flip is a jump, however small the step",
        "A log-ratio z splits exactly into what the weights do on the old routes (z_w) and what the change of routes "
        "does (z_r). z_w is smooth, so its variance falls with the square of the step. z_r is a jump of about the same "
        "size wherever a flip happens, so its variance falls only as fast as flips do: linearly.",
        "The new weights are put at old + a (new - old) for many a. On log axes the slopes should be near 2 for the "
        "variance of z_w, 1 for that of z_r and for flips, 0 for the size of a jump.",
        "The laws hold as the step goes to 0. They say nothing about a given learning rate. Slopes are fitted where "
        "at most 30% of the tokens flip and at least 30 do.",
    ),
    Step(
        "Which ratio is nearer to the weights' own",
        "For every answer, exactly: the token ratio misses what the weights alone would do by var(z_r) within the "
        "answer, the sequence ratio by var(z_w), each plus the same square of the mean of z_r. chi is the one over the "
        "other.",
        "chi above 1: the sequence ratio is nearer. chi below 1: the token ratio is, and a method that averages over "
        "the answer throws signal away. k* is the best mixture, 1 is the token ratio, 0 the sequence ratio.",
        "chi is about log-ratios, not about rewards. It says nothing of bias (step 6).",
    ),
    Step(
        "Jumps average out, what an answer shares does not",
        "A mean over n independent jumps has 1/n of their variance. A drift that all tokens of an answer share "
        "survives the mean, which is what one would want to keep.",
        "I_n is n times the variance of a mean of n tokens over that of one: 1 if tokens are independent, n if they "
        "are all alike. The sequence ratio gains where I_n of z_r is small and that of z_w large.",
        "The share of variance between answers does not average out at any length.",
    ),
    Step(
        "A hard clip turns jumps into decisions",
        "A token clip keeps or drops a token by its own ratio, so a jump across the edge toggles it. A soft gate does "
        "not toggle, but does not average either. A sequence ratio averages first.",
        "Clips are compared at the width at which they drop the same share of tokens. Router noise is added to the "
        "new policy's router logits, and the gradient's relative change is read off, for every objective. The row "
        "without a ratio cannot change; it stands there as a control, as does the full product.",
        "Low noise alone is no virtue: no ratio at all has none, and is biased (step 6).",
    ),
    Step(
        "The price of averaging",
        "Only the full product of ratios is unbiased. A sequence mean is more biased than the token ratio while the "
        "drift is small, and less once it is large. And its clip drops whole answers.",
        "Policies so small that all their answers can be enumerated give the bias without sampling. Beside it stands "
        "the bias of this batch's gradient against fresh answers of the new policy; where it lies below the "
        "reference's own noise, nothing can be said.",
        "A clip keeps a one-sided part of the gradient; a low or negative cosine of a clipped gradient is no sign of "
        "instability by itself.",
    ),
    Step(
        "Replay removes the cause, and changes the policy",
        "If the new weights take recorded experts, z_r is 0 by construction. The same cure applies to the mismatch "
        "between the rollout engine and the trainer, which hold equal weights.",
        "Mismatch d = log p(trainer) - log p(engine) splits into a numeric part (the trainer on the engine's routes) "
        "and a routing part. The ratios say how many times smaller it is under replay.",
        "The policy that is trained under replay is the one on recorded routes, not the one that will be served. "
        "A small divergence is not stability.",
    ),
)


def smaller_step_higher(name: str) -> Judge:
    """A statistic of the sweep is higher at the smallest step with enough flips than at the largest step."""

    def judged(e: Estimates) -> Finding | None:
        if "slope/from" not in e:
            return None
        alphas = [key.split("/")[1] for key in e if key.startswith("sweep/") and key.endswith("/" + name)]
        if not alphas:
            return None
        small, large = f"{e['slope/from'].value:g}", max(alphas, key=float)
        return apart(f"sweep/{small}/{name}", f"sweep/{large}/{name}")(e)

    return judged


def _noise(name: str, low: float = float("-inf"), high: float = float("inf")) -> Judge:
    return within(f"objectives/{name}/noise_vs_token/0.1", low, high)


SWEEP, OBJECTIVES, COMPARE = "sweep OLD NEW", "objectives OLD NEW --prompts FILE", "compare OLD NEW"
MISMATCH = "mismatch MODEL --prompts FILE"
CLAIMS = (
    Claim(
        "margin-theorem", 1, "While no score moves by half the margin, the set of experts stays.",
        at_most("margins/violations", 0), COMPARE, "theorem", proved=True,
    ),
    Claim(
        "flips-happen", 1, "This step changes more sets of experts than a second pass of the same weights does.",
        apart("flips/set", "floor/flips_set"), COMPARE, "arXiv 2507.18071, 5.3", seeds=1,
    ),
    Claim(
        "flips-grow", 1, "Flips grow from update to update within a rollout.",
        rising("update/", "/flips/expert"), "compare OLD NEW LATER ...", "arXiv 2507.18071, 5.3",
    ),
    Claim(
        "near-ties", 1, "Tokens with small margins flip first: the lowest tenth more than the highest.",
        apart("margins/flips_in_decile/1", "margins/flips_in_decile/10"), COMPARE, "from the theorem",
    ),
    Claim(
        "parts-sum", 2, "z = z_w + z_r for every token.",
        at_most("identity/parts_abs_max", 1e-9), COMPARE, "definition", proved=True,
    ),
    Claim(
        "weights-square", 2, "Var(z_w) falls with the square of the step (slope between 1.7 and 2.3).",
        within("slope/var_w", 1.7, 2.3), SWEEP, "theorem as the step goes to 0",
    ),
    Claim(
        "routing-linear", 2, "Var(z_r) falls linearly with the step (slope between 0.7 and 1.3).",
        within("slope/var_r", 0.7, 1.3), SWEEP, "theorem as the step goes to 0, if margins reach 0",
    ),
    Claim(
        "flips-linear", 2, "Flips fall linearly with the step (slope between 0.7 and 1.3).",
        within("slope/set", 0.7, 1.3), SWEEP, "theorem as the step goes to 0, if margins reach 0",
    ),
    Claim(
        "jump-flat", 2, "A flip is a jump of about the same size at every step (slope between -0.3 and 0.3).",
        within("slope/jump", -0.3, 0.3), SWEEP, "small MoE runs",
    ),
    Claim(
        "tails", 2, "The smaller the step, the heavier the tails of z (excess kurtosis).",
        smaller_step_higher("kurtosis_z"), SWEEP, "small MoE runs",
    ),
    Claim(
        "own-flips", 2, "Tokens whose own experts changed hold most of the sum of z_r squared.",
        within("own_flip_share", low=0.5, floored=True), COMPARE, "small MoE runs",
    ),
    Claim(
        "crossover-identity", 3, "The errors of both ratios differ by var(z_r) - var(z_w) within the answer, exactly.",
        at_most("identity/crossover_abs_max", 1e-6), COMPARE, "identity", proved=True,
    ),
    Claim(
        "sequence-nearer", 3, "At this step the sequence ratio is nearer to the weights' own ratio (chi > 1).",
        within("chi", low=1, floored=True), COMPARE, "the identity, on this pair", seeds=1,
    ),
    Claim(
        "chi-grows", 3, "chi grows as the step gets smaller.",
        smaller_step_higher("chi"), SWEEP, "from the slopes of step 2",
    ),
    Claim(
        "chi-crosses", 3, "chi passes 1 within the sweep: below that step flips decide, above it weights.",
        within("crossing/chi", low=0), SWEEP, "from the slopes of step 2",
    ),
    Claim(
        "jumps-average", 4, "Averaging an answer's tokens loses at most half of its gain on z_r (I_n < 2).",
        largest_n("inflation/z_r", high=2), COMPARE, "small MoE runs",
    ),
    Claim(
        "drift-shared", 4, "What the weights do is shared within an answer (I_n of z_w > 1).",
        largest_n("inflation/z_w", low=1), COMPARE, "small MoE runs",
    ),
    Claim(
        "drift-over-jumps", 4, "What the weights do is shared more than the jumps (I_n of z_w over that of z_r > 1).",
        largest_n("shared", low=1), COMPARE, "why a sequence ratio would help",
    ),
    Claim(
        "root-n", 4, "Under router noise the gradient of GSPO moves less than the token ratio's by n^-1/2 "
        "(slope between -0.65 and -0.35).",
        within("length/slope", -0.65, -0.35), OBJECTIVES, "law of large numbers, if jumps are independent",
    ),
    Claim(
        "no-ratio-control", 5, "A gradient without a ratio does not move when the ratio does.",
        at_most("objectives/no ratio/noise/0.1", 0), OBJECTIVES, "control", proved=True,
    ),
    Claim(
        "gate-bound", 5, "SAPO's mean gate in the log-ratio is within tau^2/4 var(z) of the gate of the mean.",
        at_most("identity/gate_bound_violations", 0), COMPARE, "theorem for the gate in z", proved=True,
    ),
    Claim(
        "token-clip-toggles", 5, "At equal share, flips decide more of what a token clip drops than a sequence clip.",
        within("clip/matched_0.05/toggled_gap", low=0), COMPARE + " with rewards", "why a sequence clip would help",
    ),
    Claim(
        "gspo-quieter", 5, "Router noise moves the gradient of GSPO less than that of the token ratio.",
        _noise("GSPO", high=1), OBJECTIVES, "small MoE runs",
    ),
    Claim(
        "sapo-no-worse", 5, "SAPO's gradient moves no more than the token ratio's (within 5%).",
        _noise("SAPO", high=1.05), OBJECTIVES, "small MoE runs",
    ),
    Claim(
        "clip-noisier", 5, "The token clip's gradient moves more than the token ratio's: noise toggles its mask.",
        _noise("token clip", low=1), OBJECTIVES, "small MoE runs",
    ),
    Claim(
        "product-noisiest", 5, "The product's gradient moves more than the token ratio's.",
        _noise("product", low=1), OBJECTIVES, "small MoE runs",
    ),
    Claim(
        "product-unbiased", 6, "The full product of ratios is unbiased.",
        all_at_most("exact/", "/product/bias", 1e-9), "bench-exact", "theorem", proved=True,
    ),
    Claim(
        "gspo-biased-small", 6, "Enumerated: at a small drift the sequence ratio is more biased than the token ratio.",
        apart("exact/0.01/GSPO/bias", "exact/0.01/token/bias"), "bench-exact", "enumeration", seeds=1,
    ),
    Claim(
        "gspo-biased-large", 6, "Enumerated: at a large drift it is less biased.",
        apart("exact/1/token/bias", "exact/1/GSPO/bias"), "bench-exact", "enumeration", seeds=1,
    ),
    Claim(
        "gspo-biased-here", 6, "On this batch the sequence ratio's gradient is more biased than the token ratio's.",
        apart("objectives/GSPO/bias2", "objectives/token/bias2"), OBJECTIVES, "enumeration, on this batch",
    ),
    Claim(
        "product-ess", 6, "The product's effective sample size lies below the token ratio's.",
        apart("ess/free/token", "ess/free/product"), COMPARE, "log-normal ratios",
    ),
    Claim(
        "published-clip", 6, "GSPO's published clip keeps most tokens of answers of this length.",
        within("clip/GSPO_published/share", high=0.5), COMPARE + " with rewards", "arXiv 2507.18071, 5.1", seeds=1,
    ),
    Claim(
        "replay-identity", 7, "A policy that replays its own routes has equal log-probs, to the bit.",
        at_most("identity/own_replay_abs_max", 0), COMPARE, "deterministic kernels", proved=True,
    ),
    Claim(
        "replay-is-another-policy", 7, "On recorded routes the new weights are another policy (Var(z_r) > 0).",
        within("var_r", low=0, floored=True), COMPARE, "definition, on this pair", seeds=1,
    ),
    Claim(
        "fp32-agrees", 7, "In fp32 engine and trainer choose the same experts (under 1 set in 1000 differs).",
        within("mismatch/float32/flips/set", high=1e-3), MISMATCH, "measured here",
    ),
    Claim(
        "mismatch-is-routing", 7, "Most of the bf16 engine's mismatch is routing.",
        within("mismatch/bfloat16/share_routing", low=0.5), MISMATCH, "arXiv 2510.11370",
    ),
    Claim(
        "replay-cuts-mismatch", 7, "On the engine's routes the divergence from a bf16 engine (k3) is smaller.",
        within("mismatch/bfloat16/free_over_replayed/k3", low=1), MISMATCH, "arXiv 2510.11370",
    ),
)  # fmt: skip

# Reported elsewhere on models of tens of billions of parameters; nothing that this tool measures decides them.
NEED_SCALE = (
    ("About 10% of the activated experts change with every update.", "arXiv 2507.18071"),
    ("94% of tokens differ in some layer between engine and trainer, about 6 layers a token.", "arXiv 2510.11370"),
    ("The divergence of engine and trainer is 2.4 times a dense model's, and half of that under replay.", "2510.11370"),
    ("Token ratios collapse at some step; GSPO, SAPO or replay prevent it.", "2507.18071, 2511.20347, 2510.11370"),
    ("R2 is better at few mini-batches a rollout, R3 at many.", "arXiv 2512.01374"),
    ("Replay or IcePop raise rewards.", "arXiv 2510.11370, 2510.18855"),
)
DO_NOT_SAY = (
    ("GSPO is unbiased.", "Only the full product is; see step 6."),
    ("A sequence ratio always has the lower error.", "Not where chi < 1; see step 3."),
    ("A small divergence means stability.", "Divergences can stay flat while the reward degrades (arXiv 2605.14220)."),
    ("SAPO becomes PPO's clip for a large tau.", "Its weight goes to 0 everywhere but at ratio 1."),
    ("SAPO equals GSPO.", "Only its mean gate, for small variance within answers; the gradient does not average."),
    ("A loss of k3 is the reverse divergence.", "Its gradient is the forward one unless weighted by the ratio."),
)
