"""Networks for images."""

from medi3d.weights.keymaps.keymap import KeyMap, norm

_LITE0_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)


def efficientnet_lite0() -> KeyMap:
    """efficientnet_lite_pytorch's EfficientNet-Lite0 -> timm's tf_efficientnet_lite0.

    The source numbers the blocks consecutively, with an expansion in all but the first; timm numbers them by
    stage and names the norms by their position in the block.
    """
    table: dict[str, str | None] = {"_fc.weight": "classifier.weight", "_fc.bias": "classifier.bias"}
    table |= {"_conv_stem.weight": "conv_stem.weight", "_conv_head.weight": "conv_head.weight"}
    table |= norm("_bn0", "bn1") | norm("_bn1", "bn2")
    places = [(stage, block) for stage, count in enumerate(_LITE0_BLOCKS_PER_STAGE) for block in range(count)]
    for number, (stage, block) in enumerate(places):
        published, ours = f"_blocks.{number}", f"blocks.{stage}.{block}"
        parts = [("_depthwise_conv", "conv_dw", "_bn1"), ("_project_conv", "conv_pwl", "_bn2")]
        if number == 0:
            parts[1] = ("_project_conv", "conv_pw", "_bn2")
        else:
            parts.insert(0, ("_expand_conv", "conv_pw", "_bn0"))
        for place, (their_conv, our_conv, their_norm) in enumerate(parts, start=1):
            table[f"{published}.{their_conv}.weight"] = f"{ours}.{our_conv}.weight"
            table |= norm(f"{published}.{their_norm}", f"{ours}.bn{place}")
    return KeyMap(table)
