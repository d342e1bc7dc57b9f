"""Settings of the network, as our table [adapter]."""

from __future__ import annotations

from lora_diffusion.kohya.blocks import CONVOLUTIONS, NUM_BLOCKS, SIDES, block_pattern, named_weights
from lora_diffusion.kohya.keys import NETWORK
from lora_diffusion.kohya.ledger import Ledger

LYCORIS_KINDS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
LYCORIS_TARGETS = {
    "full": "full",
    "attn-mlp": "attention-mlp",
    "attn-only": "attention",
    "unet-transformer-only": "attention-mlp",
}
DEFAULT_RANK = 4  # of networks.lora and LyCORIS
HIGHEST_RANK = 1024
"""Of `adapter.rank`. A LoKr's larger factor is whole from half its longer side on, in LyCORIS as here."""
_WHOLE_FACTOR = 5
"""The lowest `factor` with which that is so for every layer: the widest, of 10240 channels, is then 2048 long."""
_PLAIN = "a plain lora is trained"


def translate_network(ledger: Ledger) -> None:
    """Fill [adapter] but for the text encoder."""
    kind = _kind(ledger)
    ledger.put("adapter.kind", kind, "network_module", f"{NETWORK}algo", f"{NETWORK}dora_wd")
    rank = ledger.whole("network_dim")
    ledger.put("adapter.rank", rank or DEFAULT_RANK, "network_dim", note="" if rank else f"{DEFAULT_RANK} if not given")
    rank = rank or DEFAULT_RANK
    alpha = ledger.number("network_alpha")
    note = "1 if not given" if alpha is None else "" if alpha else "0 is the rank there"
    alpha = 1.0 if alpha is None else alpha or float(rank)
    ledger.put("adapter.alpha", alpha, "network_alpha", note=note)
    targets = _targets(ledger)
    _patterns(ledger, kind, alpha, targets)
    if kind == "lokr" and rank > HIGHEST_RANK:
        _whole_factors(ledger, rank)
    if kind != "lokr":
        ledger.ignore(f"{NETWORK}factor", "is for lokr")
    elif ledger.is_on(f"{NETWORK}factor"):
        ledger.put("adapter.lokr_factor", ledger.whole(f"{NETWORK}factor"), f"{NETWORK}factor")
    if ledger.switch(f"{NETWORK}rs_lora"):
        if kind == "lokr":
            ledger.refuse(f"{NETWORK}rs_lora", "a lokr here has no alpha to divide by the root of the rank")
        else:
            ledger.put("adapter.rslora", True, f"{NETWORK}rs_lora")
    _dropouts(ledger, kind)
    if ledger.is_on("network_weights"):
        ledger.put("adapter.start_from", ledger.text("network_weights"), "network_weights")
    if ledger.is_on("scale_weight_norms"):
        ledger.put("adapter.max_norm", ledger.number("scale_weight_norms"), "scale_weight_norms")


def _whole_factors(ledger: Ledger, rank: int) -> None:
    """What a rank beyond any layer means in LyCORIS, where 100000 is usual: whole factors, and no alpha."""
    whole = f"{rank} there; from {HIGHEST_RANK} on both factors are whole"
    ledger.put("adapter.rank", HIGHEST_RANK, "network_dim", note=whole)
    ledger.put("adapter.alpha", float(HIGHEST_RANK), "network_alpha", note="without effect on whole factors")
    if 0 < (ledger.number(f"{NETWORK}factor") or 0) < _WHOLE_FACTOR:
        ledger.differ(
            f"network_dim: with a factor below {_WHOLE_FACTOR} the largest layers get factors of rank {HIGHEST_RANK}, "
            "of more or whole ones there"
        )


def _kind(ledger: Ledger) -> str:
    module, algorithm = ledger.text("network_module"), ledger.text(f"{NETWORK}algo").lower()
    is_dora = ledger.switch(f"{NETWORK}dora_wd")
    if not module.startswith("lycoris"):
        if module not in ("", "networks.lora"):
            ledger.refuse("network_module", _PLAIN)
        return "lora"
    kind = LYCORIS_KINDS.get(algorithm or "lora")
    if kind is None:
        ledger.refuse(f"{NETWORK}algo", _PLAIN)
    if is_dora and kind in ("loha", "lokr"):
        ledger.refuse(f"{NETWORK}dora_wd", f"a {kind} here trains no magnitudes; a plain {kind} is trained")
    return "dora" if is_dora and kind == "lora" else kind or "lora"


def _targets(ledger: Ledger) -> str:
    """Which layers get an adapter, which also says what the blocks hold."""
    preset = ledger.text(f"{NETWORK}preset")
    is_lycoris = ledger.text("network_module").startswith("lycoris")
    if is_lycoris:
        targets = LYCORIS_TARGETS.get(preset or "full", "full")
        if preset and preset not in LYCORIS_TARGETS:
            ledger.refuse(f"{NETWORK}preset", '`adapter.targets = "full"` is used, or name the layers there')
    else:
        has_convolutions = ledger.is_on(f"{NETWORK}conv_dim") or ledger.is_on(f"{NETWORK}conv_block_dims")
        targets = "full" if has_convolutions else "attention-mlp"
    ledger.put(
        "adapter.targets",
        targets,
        f"{NETWORK}preset",
        note="the layers of LyCORIS" if is_lycoris else "the layers of networks.lora",
    )
    return targets


def _patterns(ledger: Ledger, kind: str, alpha: float, targets: str) -> None:
    """Ranks, alphas and learning rates of single blocks and of 3x3 convolutions. The first pattern found counts."""
    family = _family(ledger)
    entries: list[tuple[str, float, float]] = []
    rates: dict[str, float] = {}
    if family:
        entries += _block_entries(ledger, family, targets, "conv_block_", rf"(?=.*{CONVOLUTIONS})", 1.0)
    is_lycoris = ledger.text("network_module").startswith("lycoris")
    conv_rank = ledger.whole(f"{NETWORK}conv_dim")
    if targets != "full":
        for name in ("conv_dim", "conv_alpha"):
            ledger.ignore(f"{NETWORK}{name}", "no convolutions are trained")
    elif conv_rank:
        conv_alpha = ledger.number(f"{NETWORK}conv_alpha")
        if conv_alpha is None:
            conv_alpha = alpha if is_lycoris else 1.0
        if kind == "lokr" and conv_rank > HIGHEST_RANK:
            conv_rank, conv_alpha = HIGHEST_RANK, float(HIGHEST_RANK)
        entries.append((CONVOLUTIONS, conv_rank, conv_alpha or float(conv_rank)))
    if family:
        no_convolutions = rf"(?!.*{CONVOLUTIONS})" if targets == "full" else ""
        entries += _block_entries(ledger, family, targets, "block_", no_convolutions, alpha)
        rates = {pattern: 0.0 for pattern, number, _ in entries if number < 1} | _block_rates(ledger, family, targets)
    trained = [entry for entry in entries if entry[1] >= 1]
    names = [f"{NETWORK}{name}" for name in _RANKS if ledger.is_on(f"{NETWORK}{name}")]
    if trained:
        ledger.put("adapter.rank_pattern", {pattern: int(number) for pattern, number, _ in trained}, *names)
        ledger.put("adapter.alpha_pattern", {pattern: scale for pattern, _, scale in trained}, *names)
    if rates:
        of_rates = [f"{NETWORK}{name}" for name in _RATES if ledger.is_on(f"{NETWORK}{name}")]
        ledger.put("adapter.lr_pattern", rates, *(of_rates or names))


_RANKS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")


def _family(ledger: Ledger) -> str | None:
    """Which UNet the lists of blocks are for, told by their length; None without such lists."""
    lists = [f"{NETWORK}{name}" for name in (*_RANKS[2:], *_RATES[:3]) if ledger.is_on(f"{NETWORK}{name}")]
    if not lists:
        return None
    lengths = {name.removeprefix(NETWORK): len(_split(ledger, name)) for name in lists}
    for family in NUM_BLOCKS:
        if any(length == _num_values(family, name) for name, length in lengths.items()):
            return family
    if ledger.switch("sdxl"):
        return "sdxl"
    if ledger.switch("v2"):
        return "sd"
    for name in lists:
        ledger.refuse(name, "the file does not tell for which model family: set `adapter.lr_pattern` by module paths")
    return None


def _num_values(family: str, name: str) -> int:
    """How long a list is that speaks of all blocks, or of those of one side or the middle."""
    side, middle = SIDES[family]
    return NUM_BLOCKS[family] if "block" in name else middle if name.startswith("mid") else side


def _split(ledger: Ledger, name: str) -> list[float]:
    """A list of numbers; none where a curve is named."""
    value = ledger.value(name)
    return [] if isinstance(value, str) and value[:1].isalpha() else ledger.numbers(name)


def _block_entries(
    ledger: Ledger, family: str, targets: str, prefix: str, only: str, alpha: float
) -> list[tuple[str, float, float]]:
    """(pattern, rank, alpha) of each block in a list of ranks. only: a condition on the module paths."""
    ranks, alphas = (_per_block(ledger, f"{NETWORK}{prefix}{what}", family) for what in ("dims", "alphas"))
    entries: list[tuple[str, float, float]] = []
    for block, number in enumerate(ranks):
        pattern = block_pattern(family, block, targets)
        has_convolutions = (family, block) != ("sdxl", 11)
        has_others = "downsamplers" not in (pattern or "")
        if pattern and (not only or (has_convolutions if only.startswith("(?=") else has_others)):
            place = rf"^{only}(?:{pattern})" if only else pattern
            entries.append((place, number, (alphas[block] if alphas else alpha) or number))
    return entries


def _per_block(ledger: Ledger, name: str, family: str) -> list[float]:
    numbers = _split(ledger, name) if ledger.is_on(name) else []
    if numbers and len(numbers) != NUM_BLOCKS[family]:
        ledger.wrong(name, f"{NUM_BLOCKS[family]} numbers, one for each block")
        return []
    return numbers


def _block_rates(ledger: Ledger, family: str, targets: str) -> dict[str, float]:
    """Multiples of the learning rate by block, without those that are 1."""
    threshold = ledger.number(f"{NETWORK}block_lr_zero_threshold") or 0.0
    weights: list[float] = [] if family == "sd" else [1.0]
    for name in _RATES[:3]:
        weights += _weights(ledger, f"{NETWORK}{name}", _num_values(family, name), threshold)
    patterns = {block_pattern(family, block, targets): weight for block, weight in enumerate(weights)}
    return {pattern: weight for pattern, weight in patterns.items() if pattern and weight != 1}


def _weights(ledger: Ledger, name: str, count: int, threshold: float) -> list[float]:
    """The weights of one side; missing ones are 1, and those that are not above the threshold 0."""
    if not ledger.is_on(name):
        return [1.0] * count
    given = _split(ledger, name) or named_weights(str(ledger.value(name)), count)
    if given is None:
        ledger.wrong(name, "numbers, or sine, cosine, linear, reverse_linear or zeros")
        return [1.0] * count
    return ([weight if weight > threshold else 0.0 for weight in given] + [1.0] * count)[:count]


def _dropouts(ledger: Ledger, kind: str) -> None:
    for name, key in (
        ("network_dropout", "dropout"),
        (f"{NETWORK}rank_dropout", "rank_dropout"),
        (f"{NETWORK}module_dropout", "module_dropout"),
    ):
        if not ledger.is_on(name):
            continue
        if kind in ("loha", "lokr") and key != "module_dropout":
            ledger.refuse(name, f"a {kind} here has `adapter.module_dropout` only")
        else:
            ledger.put(f"adapter.{key}", ledger.number(name), name)
