"""Which figures and which numbers the report shows at each step of the argument."""

from __future__ import annotations

from dataclasses import dataclass

from moe.show import plots as p
from moe.show import plots_objectives as o
from moe.show.plots import Panel
from moe.show.plots_routers import router_health


@dataclass(frozen=True)
class Spec:
    """A figure: its file's name, prefixes of the names that must have been measured, panels, and what is to be seen."""

    name: str
    needs: tuple[str, ...]
    panels: tuple[Panel, ...]
    caption: str


FIGURES: dict[int, list[Spec]] = {
    1: [
        Spec(
            "flips",
            ("flips/set/layer_",),
            (p.flips_by_layer, p.flips_by_margin),
            "Bars are 95% intervals over prompts. On the right: near ties flip first.",
        ),
        Spec(
            "updates",
            ("update/1/flips",),
            (p.flips_by_update, p.parts_by_update, p.chi_by_update),
            "The policies are those given after OLD, in their order: the updates of one rollout, or later versions. "
            "Above the red line the sequence ratio is the nearer one.",
        ),
    ],
    2: [
        Spec(
            "laws",
            ("sweep/",),
            (p.sweep_variances, p.sweep_flips, p.sweep_jump, p.sweep_tails),
            "Where the orange line lies above the blue one, most of a token's log-ratio is routing. A jump that is as "
            "large at every step gives a flat line; tails grow where few tokens carry all of it. Hollow points say "
            "little: their interval reaches below a tenth of the value.",
        ),
    ],
    3: [
        Spec(
            "chi",
            ("sweep/",),
            (p.sweep_chi, p.sweep_k_star),
            "The step that was taken is a = 1. Hollow points say little, as above.",
        )
    ],
    4: [
        Spec(
            "averaging",
            ("inflation/z_w/", "inflation/z_r/"),
            (p.averaging,),
            "Near the dotted line a mean over n tokens has 1/n of the variance; near the dashed one it has all of it.",
        ),
        Spec("length", ("length/",), (p.length_law,), "Answers are cut to their first n tokens."),
    ],
    5: [
        Spec("toggles", ("clip/matched_",), (o.toggles,), "Lower is better: fewer decisions hang on a flip."),
        Spec(
            "noise",
            ("objectives/",),
            (o.sensitivity, o.used),
            "Further left moves less. Read it together with the bias in step 6: no ratio at all does not move, and is "
            "biased.",
        ),
    ],
    6: [
        Spec("exact", ("exact/",), (o.exact,), "Left: small drift, where the sequence ratio is the more biased one."),
        Spec(
            "bias",
            ("objectives/token/bias2",),
            (o.bias,),
            "A point whose bar reaches 0 cannot be told from no bias; what lies within the grey band is smaller than "
            "the noise of the reference itself.",
        ),
    ],
    7: [Spec("mismatch", ("mismatch/",), (o.mismatch, o.mismatch_bins), "Engine and trainer hold equal weights.")],
}
ROUTERS = Spec("routers", ("router/",), (router_health,), "")
# step -> the numbers that a reader should see without opening the appendix
SUMMARY: dict[int, tuple[str, ...]] = {
    1: (
        *(f"flips/{name}" for name in ("expert", "set", "token_any", "token_any_independent", "layers_per_token")),
        *("flips/gate_mass", "flips/set_prompt", "floor/flips_set"),
        *(f"margins/{name}" for name in ("violations", "explained", "predicted", "linear")),
    ),
    2: (
        *("var_z", "var_w", "var_r", "covariance", "share_routing", "share_routing_first", "share_routing_shapley"),
        *("own_flip_share", "jump", "kurtosis_z", "floor/var_z", "dense/var_z", "dense/kurtosis_z"),
        *(f"slope/{name}" for name in ("var_w", "var_r", "set", "jump")),
    ),
    3: ("chi", "k_star", "crossing/chi"),
    4: ("between/z_w", "between/z_r", "length/slope", "ess/free/token", "ess/free/geo", "ess/free/product"),
    5: (
        *("clip/token_0.2/share", "clip/token_0.2/toggled", "clip/GSPO_published/share"),
        *("clip/SAPO/gate", "clip/SAPO/mass"),
    ),
    6: (
        *("reference/noise2", "reference/ceiling"),
        *(f"objectives/{name}/bias2" for name in ("token", "SAPO", "GSPO", "no ratio", "product")),
    ),
    7: (
        *(f"mismatch/bfloat16/{name}" for name in ("share_routing", "flips/set", "flips/token_any", "floor/abs_max")),
        *(f"mismatch/bfloat16/{name}" for name in ("free/abs_max", "replayed/abs_max", "free_over_replayed/k3")),
    ),
}
