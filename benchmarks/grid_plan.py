"""What the grid runs: recipes, the runs in their order, and how a recipe makes and trains a compressed copy."""

import dataclasses
import itertools

CONVOLUTIONS, ENCODER = "depthwise|subsampling/conv", "encoder"  # paths; the first stay float
BLOCKS = r"/(block_|layers\.)[0-9]+$"  # of a Conformer and of Moonshine
EPOCHS, LEARNING_RATE = 10, 1e-3
MOONSHINE_EPOCHS, MOONSHINE_RATE = 3, 2e-4  # eight times the weights, and pre-trained
BITS, PATTERNS = (None, 8, 4, 3, 2), (None, "4:8", "2:4", "1:4")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a compressed copy is made and fine-tuned.

    Attributes:
        scale, codebook: of `QuantizationConfig`.
        start: "float" weights; for sparse copies also those "permuted" by `permute_channels`, or "one-shot": permuted,
            then pruned with compensation by `one_shot`; "rounded": that, and rounded in the same pass.
        pruning: "few" magnitude shots in the first third of the training (the paper's way), "one" before its first
            step, "gradual" (structure decay in the first half), "every step" (SR-STE, frozen after two thirds), or
            "none" (masks stay as the start made them).
        distill: weight of the divergence from the float checkpoint, a mean over frames, beside CTC's sum.
        hidden: weight of the distance from the outputs of the float checkpoint's blocks.
        co_train: train a branch of 4 bits (8, if the copy has 4) with the same latent weights.
        rate: share of the peak learning rate.
        late: fine-tune the float model for the whole budget (this is the control of the same seed), then compress it.
        share: how much of the budget's epochs a copy is trained; if late, on top of them and taught by the control.
    """

    scale: str = "absmax"
    codebook: str = "symmetric"
    start: str = "float"
    pruning: str = "few"
    distill: float = 0.0
    hidden: float = 0.0
    co_train: bool = False
    rate: float = 1.0
    late: bool = False
    share: float = 1.0


# "paper" is the paper's way. Those of the second group differ from it in one thing, those of the third combine. From
# "one-shot, distilled" to "brisk, four levels, guided": made with an earlier `one_shot`, so no runs are added to them.
RECIPES = {
    "paper": Recipe(),
    "mse": Recipe(scale="mse"),
    "learned": Recipe(scale="learned"),
    "full": Recipe(scale="learned", codebook="full"),
    "four levels": Recipe(scale="learned", codebook="midrise"),
    "distilled": Recipe(distill=1.0),
    "co-trained": Recipe(co_train=True),
    "one mask": Recipe(pruning="one"),
    "gradual": Recipe(pruning="gradual"),
    "SR-STE": Recipe(pruning="every step"),
    "STEP": Recipe(pruning="STEP"),
    "permuted": Recipe(start="permuted"),
    "compensated": Recipe(scale="mse", start="one-shot", pruning="none"),
    "learned, distilled": Recipe(scale="learned", distill=1.0),
    "four levels, distilled": Recipe(scale="learned", codebook="midrise", distill=1.0),
    "SR-STE, distilled": Recipe(pruning="every step", distill=1.0),
    "SR-STE, learned": Recipe(scale="learned", pruning="every step"),
    "one-shot, distilled": Recipe(scale="learned", start="one-shot", pruning="none", distill=1.0),
    "gentle": Recipe(scale="learned", start="one-shot", pruning="none", distill=1.0, rate=0.3),
    "gentle, rounded": Recipe(scale="learned", start="rounded", pruning="none", distill=1.0, rate=0.3),
    "gentle, four levels": Recipe("learned", "midrise", start="rounded", pruning="none", distill=1.0, rate=0.3),
    "brisk": Recipe(scale="learned", start="one-shot", pruning="none", distill=1.0, rate=3.0),
    "brisk, rounded": Recipe(scale="learned", start="rounded", pruning="none", distill=1.0, rate=3.0),
    "brisk, four levels": Recipe("learned", "midrise", start="rounded", pruning="none", distill=1.0, rate=3.0),
    "brisk, guided": Recipe("learned", start="one-shot", pruning="none", distill=1.0, hidden=100.0, rate=3.0),
    "brisk, four levels, guided": Recipe(
        "learned", "midrise", start="rounded", pruning="none", distill=1.0, hidden=100.0, rate=3.0
    ),
    "matched": Recipe(scale="learned", start="rounded", pruning="none", distill=1.0),
    "matched, brisk": Recipe(scale="learned", start="rounded", pruning="none", distill=1.0, rate=3.0),
    "refitted, brisk": Recipe(scale="learned", start="one-shot", pruning="none", distill=1.0, rate=3.0),
    "matched, four levels": Recipe("learned", "midrise", start="rounded", pruning="none", distill=1.0),
    "late": Recipe(scale="mse", start="rounded", pruning="none", late=True, share=0.0),
    "late, four levels": Recipe("mse", "midrise", start="rounded", pruning="none", late=True, share=0.0),
    "settled": Recipe("learned", start="rounded", pruning="none", distill=1.0, rate=0.3, late=True, share=0.4),
    "settled, four levels": Recipe(
        "learned", "midrise", start="rounded", pruning="none", distill=1.0, rate=0.3, late=True, share=0.4
    ),
    "settled, usual rate": Recipe("learned", start="rounded", pruning="none", distill=1.0, late=True, share=0.4),
    "settled, usual rate, four levels": Recipe(
        "learned", "midrise", start="rounded", pruning="none", distill=1.0, late=True, share=0.4
    ),
    "settled, brisk": Recipe("learned", start="rounded", pruning="none", distill=1.0, rate=3.0, late=True),
    "paper, brisk": Recipe(rate=3.0),
    "settled, brisk, four levels": Recipe(
        "learned", "midrise", start="rounded", pruning="none", distill=1.0, rate=3.0, late=True
    ),
    "settled, brisk, long": Recipe(
        "learned", start="rounded", pruning="none", distill=1.0, rate=3.0, late=True, share=2.0
    ),
    "hidden": Recipe(distill=1.0, hidden=1.0),
    "taught": Recipe(distill=100.0),
}
CONTROL = (None, None, "paper")  # the float model, fine-tuned for as long
CENTRE = ((4, "2:4"), (2, None), (4, "1:4"), (2, "2:4"), (2, "1:4"))
MASKS = ("gradual", "SR-STE", "STEP", "permuted", "compensated", "co-trained")  # ablations of sparse cells


def _plan():
    """Yield (bits, pattern, recipe, seed), most telling first; a run may be named twice."""
    for cells in (CENTRE[:3], CENTRE):  # what the targets name comes first
        for seed in (0, 1, 2):
            yield (*CONTROL, seed)
            yield from ((*cell, recipe, seed) for cell in cells for recipe in ("paper", "distilled"))
        yield from ((4, "2:4", recipe, 0) for recipe in ("taught", "hidden"))
    for seed in (0, 1, 2):
        yield from (
            (*cell, "matched" if cell[0] != 2 else "matched, four levels", seed) for cell in (*CENTRE[:3], (3, None))
        )
    yield from ((4, "2:4", recipe, seed) for seed in (0, 1, 2) for recipe in ("refitted, brisk", "matched, brisk"))
    for seed in range(6):
        yield (2, None, "learned, distilled", seed)
    for seed in (0, 1, 2):  # smaller than dense int2
        yield from ((2, pattern, "learned, distilled", seed) for pattern in ("2:4", "4:8", "1:4"))
    for seed in range(6):  # the seeds that "distilled" has, so that ways are compared on equal ones
        yield from ((*cell, "paper", seed) for cell in (*CENTRE[:3], (2, "2:4")))
        yield (None, None, "distilled", seed)  # what a teacher does for the float model
        yield (2, "2:4", "learned, distilled", seed)
    for seed in range(6):  # three seeds left intervals of 20 % on asc_connected
        yield (*CONTROL, seed)
        yield from ((*cell, "distilled", seed) for cell in (*CENTRE[:3], (3, None), (3, "1:4")))
        yield from ((*cell, f"late{', four levels' * (cell[0] == 2)}", seed) for cell in (*CENTRE, (3, None)))
    for seed in (4, 5, 6, 1, 2, 3):  # 4 to 6 for asc_connected, 1 to 3 for so762: earlier float models were not kept
        yield (*CONTROL, seed)
        for way in ("settled", "settled, usual rate", "settled, brisk"):
            yield (None, None, way, seed)
            yield from ((*cell, way, seed) for cell in (*CENTRE, (3, None)))
            yield from ((*cell, f"{way}, four levels", seed) for cell in CENTRE if cell[0] == 2)
    for seed in (7, 8, 9):  # as many of the paper's own cell as "distilled" has
        yield from ((*CONTROL, seed), (None, None, "settled", seed), (4, "2:4", "settled", seed))
    for seed in (10, 11):  # for the cells with one seed of "settled": earlier float models were not kept
        yield from ((*CONTROL, seed), (None, None, "settled", seed))
    for bits, pattern in ((None, None), (4, "2:4"), (3, None)):  # so762
        yield (bits, pattern, "settled, brisk, long", 4)
    yield (4, "2:4", "paper, brisk", 0)
    for seed in (0, 1, 2):
        yield from ((2, None, recipe, seed) for recipe in ("mse", "learned", "full", "four levels", "co-trained"))
        yield from ((4, "1:4", recipe, seed) for recipe in ("one mask", *MASKS))
        yield from ((2, "2:4", recipe, seed) for recipe in ("mse", "learned", "four levels", *MASKS))
    for seed in range(6):  # of the single changes, dev preferred these two
        yield from ((2, "2:4", recipe, seed) for recipe in ("SR-STE", "four levels"))
        yield (2, None, "learned", seed)
    for seed in (0, 1, 2):
        yield from ((2, "2:4", f"{recipe}, distilled", seed) for recipe in ("SR-STE", "four levels"))
        yield (2, "2:4", "SR-STE, learned", seed)
    for number in range(3):
        for cell in itertools.product(BITS, PATTERNS):
            yield (*cell, "paper", number)
            hard = cell[0] == 2 or cell[1] == "1:4"  # of the cells above, dev prefers "distilled" for these
            settled = ((4, 5, 6) if cell in ((4, "2:4"), (3, None)) else (4, 10, 11))[number]
            yield (*cell, *(("distilled", number) if hard else ("settled", settled)))


PLAN = tuple(dict.fromkeys(_plan()))


def run_name(bits, pattern, recipe, seed):
    """Name of a run in files and on the command line."""
    return f"{cell_name(bits, pattern)} {recipe.replace(', ', '-').replace(' ', '-')} {seed}"


def cell_name(bits, pattern):
    """A cell of the grid as tables and the command line name it."""
    return f"{'float' if bits is None else f'int{bits}'} {pattern or 'dense'}"


def file_name(run):
    """The name without what file systems dislike."""
    return run.replace(" ", "_").replace(":", "_")


def compressed(usm, float_model, bits, pattern, recipe, calibration):
    """Return the copy that will be fine-tuned."""
    left_out = {CONVOLUTIONS: (None, None)}
    if bits is None and pattern is None:
        return usm.compress(float_model, {**left_out, ENCODER: (None, None)})
    if pattern and recipe.start != "float":
        float_model = usm.compress(float_model, {**left_out, ENCODER: (None, pattern)})
        usm.permute_channels(float_model)
        if recipe.start == "one-shot":
            usm.one_shot(float_model, calibration)
    if recipe.start == "rounded":
        grid = bits and usm.QuantizationConfig(bits, scale="mse", codebook=recipe.codebook)
        float_model = usm.compress(float_model, {**left_out, ENCODER: (grid, pattern)})
        usm.one_shot(float_model, calibration)
    quantization = bits and usm.QuantizationConfig(bits, scale=recipe.scale, codebook=recipe.codebook)
    sparsity = pattern and usm.SparsityConfig.resolve(pattern)
    if pattern and recipe.pruning in ("every step", "STEP"):
        sparsity = sparsity.replace(every_step=True, gradient="sr_ste")
    model = usm.compress(float_model, {**left_out, ENCODER: (quantization, sparsity)})
    if recipe.pruning == "none":
        if pattern:
            for layer, settled in zip(usm.compressed_layers(model), usm.compressed_layers(float_model), strict=True):
                layer.mask.assign(settled.mask)
        for layer in usm.compressed_layers(model):
            layer.update_scale()  # of the survivors
    if bits and recipe.start == "rounded":
        for layer, settled in zip(usm.compressed_layers(model), usm.compressed_layers(float_model), strict=True):
            layer.kernel_scale.assign(settled.kernel_scale)  # the same integers
    return model


def learner_of(usm, model, float_model, recipe):
    """Return what is compiled and fitted so that the model learns."""
    if recipe.co_train:
        bits = min(layer.active_bits for layer in usm.compressed_layers(model))
        return usm.CoTrainer(model, high_bits=4 if bits < 4 else 8)
    if not recipe.distill:
        return model
    return usm.Distiller(
        model, float_model, kl_weight=recipe.distill, hidden_weight=recipe.hidden, hidden_layers=BLOCKS
    )


def freeze_step(recipe, steps):
    """The step from which the optimizer keeps its second moment, or None."""
    return steps // 3 if recipe.pruning == "STEP" else None


def schedules(usm, recipe, bits, pattern, epochs, epoch_steps):
    """Return what makes masks, and what estimates "mse" scales anew in every epoch, while training."""
    callbacks, steps = [], epochs * epoch_steps
    if pattern and recipe.pruning != "none":
        arguments = {
            "one": {},
            "few": {"num_shots": 5, "interval": max(steps // 15, 1)},
            "gradual": {"num_shots": 5, "interval": max(steps // 10, 1), "gradual": True},
            "every step": {"freeze_step": 2 * steps // 3},
            "STEP": {"start_step": steps // 3, "freeze_step": 2 * steps // 3},
        }
        callbacks.append(usm.callbacks.NMPruning(**arguments[recipe.pruning]))
    if bits and recipe.scale == "mse":
        callbacks.append(usm.callbacks.QuantizationSchedule([(0, bits)], scale_interval=epoch_steps))
    return callbacks
