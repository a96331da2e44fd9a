"""SAM 2 taken apart: every tensor in one place, the masks of transformers' own modules, costs as torch counts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_segmentation import segmentation_settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam2VideoConfig, Sam2VideoModel

from trainables import sam2_files
from trainables.costs import IMAGES
from trainables.model_files import BackboneError
from trainables.sam2 import ClipSegmenter, load_sam2
from trainables.sam2_costs import ClipShape, sam2_costs
from trainables.sam2_files import DRAWN, Sam2Files, find_sam2
from trainables.strategy import Phase
from trainables.task import named_tensors, set_phase, weights_sha256
from trainables.tasks import TASKS

SIZE, STRUCTURES, PROMPTS = 64, 3, 2
FEATURES = 5  # four layers of memory attention
BOXES = torch.tensor([[0.0, 0.0, 63.0, 63.0], [10.0, 20.0, 30.0, 50.0]])


def clips(images: int = 2, seed: int = 0) -> Tensor:
    """(B, 9, 64, 64): two frames of noise, and a square for each structure."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, STRUCTURES, SIZE, SIZE)
    for c in range(STRUCTURES):
        masks[:, c, 8 + 12 * c : 24 + 12 * c, 10:40] = 1
    return torch.cat([torch.randn(images, 6, SIZE, SIZE, generator=generator), masks], dim=1)


def prompts(images: int = 2) -> Tensor:
    """(B, 3, 2, 2, 3): both boxes, as corners, for every structure."""
    corners = torch.stack([torch.cat([b.view(2, 2), torch.tensor([[2.0], [3.0]])], dim=1) for b in BOXES])
    return corners.expand(images, STRUCTURES, 2, 2, 3)


@pytest.fixture(scope="module")
def files() -> Sam2Files:
    return find_sam2("tiny-sam2")


@pytest.fixture
def model(files: Sam2Files) -> ClipSegmenter:
    return ClipSegmenter(load_sam2(files, SIZE), STRUCTURES).eval()


# --------------------------------------------------------------------------------------------------------------- parts


def test_every_tensor_belongs_to_exactly_one_of_base_blocks_and_head(model: ClipSegmenter) -> None:
    owners: dict[int, int] = {}
    for part in (*model.base(), *model.blocks(), model.head()):
        for tensor in (*part.parameters(), *part.buffers()):
            owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    assert owners == {id(tensor): 1 for _, tensor in named_tensors(model)}


def test_the_blocks_hold_all_of_memory_attention_that_learns(model: ClipSegmenter, files: Sam2Files) -> None:
    whole = load_sam2(files, SIZE).memory_attention
    assert sum(p.numel() for block in model.blocks() for p in block.parameters()) == sum(
        p.numel() for p in whole.parameters()
    )
    assert len(model.blocks()) == files.layers == len(whole.layers)


def test_gradients_reach_every_tensor_of_memory_attention_and_nothing_frozen(model: ClipSegmenter) -> None:
    set_phase(model, Phase("tune", 1, 4, unfrozen=4, base=False))
    model.predict(model.advance(clips(), IMAGES, FEATURES), prompts()).square().mean().backward()
    for block in model.blocks():
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for part in model.base() for p in part.parameters())


def test_the_whole_model_learns_once_the_base_is_free(model: ClipSegmenter) -> None:
    set_phase(model, Phase("tune", 1, 4, unfrozen=4, base=True))
    model.predict(model.advance(clips(), IMAGES, FEATURES), prompts()).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("vision_encoder.backbone.patch_embed", "conv_s0", "conv_s1", "vision_encoder.neck"):
        assert any(name.startswith(f"image_side.{part}") for name in reached), part
    for part in ("memory_side.encoder.mask_downsampler", "memory_side.temporal_positions", "prompt_encoder"):
        assert any(name.startswith(part) for name in reached), part


@pytest.mark.parametrize("middle", [0, 1, 3, 4])
def test_going_by_way_of_any_position_gives_the_same_bits(model: ClipSegmenter, middle: int) -> None:
    x = clips()
    with torch.no_grad():
        at_once = model.advance(x, IMAGES, FEATURES)
        assert torch.equal(model.advance(model.advance(x, IMAGES, middle), middle, FEATURES), at_once)
        assert torch.equal(model.advance(at_once, FEATURES, FEATURES), at_once)


# ----------------------------------------------------------------------------------------------- against transformers


def their_logits(sam: Sam2VideoModel, clip: Tensor) -> Tensor:
    """(C, P, 16, 16) logits of a clip on transformers' own way: image features, memory attention, box prompts."""
    image, frame, masks = clip[:3][None], clip[3:6][None], clip[6:]
    seen, remembered = sam.get_image_features(image), sam.get_image_features(frame)
    sizes = sam.backbone_feature_sizes
    fine, middle = (
        f.permute(1, 2, 0).view(1, -1, *s) for f, s in zip(seen.fpn_hidden_states[:2], sizes[:2], strict=True)
    )
    frame_features = remembered.fpn_hidden_states[-1].permute(1, 2, 0).view(1, -1, *sizes[-1])
    logits = []
    for mask in masks:
        memory, positions = sam.memory_encoder(frame_features, mask[None, None] * 20.0 - 10.0)
        conditioned = sam.memory_attention(
            current_vision_features=seen.fpn_hidden_states[-1],
            current_vision_position_embeddings=seen.fpn_position_encoding[-1],
            memory=memory.flatten(2).permute(2, 0, 1),
            memory_posision_embeddings=positions.flatten(2).permute(2, 0, 1)
            + sam.memory_temporal_positional_encoding[-1],
        )
        sparse, dense = sam.prompt_encoder(None, None, BOXES[None], None)
        out, _, _, _ = sam.mask_decoder(
            image_embeddings=conditioned.squeeze(1).transpose(1, 2).reshape(1, -1, *sizes[-1]),
            image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[fine, middle],
        )
        logits.append(out[0, :, 0])
    return torch.stack(logits)


def test_the_masks_are_those_of_transformers_own_modules(model: ClipSegmenter, files: Sam2Files) -> None:
    """In float32; transformers rounds the memory to bfloat16 on its way, which is left out on both sides here."""
    sam = load_sam2(files, SIZE).eval()
    sam.mask_decoder.dynamic_multimask_via_stability = False
    x = clips()
    with torch.no_grad():
        ours = model.predict(model.advance(x, IMAGES, FEATURES), prompts())
        theirs = torch.stack([their_logits(sam, clip) for clip in x])
    assert ours.shape == theirs.shape == (2, STRUCTURES, PROMPTS, SIZE // 4, SIZE // 4)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_evaluation_takes_the_mask_that_training_trains(model: ClipSegmenter) -> None:
    features = model.advance(clips(), IMAGES, FEATURES).detach()
    evaluated = model.predict(features, prompts())
    model.mask_decoder.train()
    assert torch.equal(model.predict(features, prompts()), evaluated)


# ------------------------------------------------------------------------------------------------------- files, weights


def test_drawn_weights_are_the_same_for_all_and_leave_the_generator_alone(files: Sam2Files) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = weights_sha256(ClipSegmenter(load_sam2(files, SIZE), STRUCTURES))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert weights_sha256(ClipSegmenter(load_sam2(files, SIZE), STRUCTURES)) == first


def test_drawn_frozen_parts_pass_on_what_they_see(model: ClipSegmenter) -> None:
    """Features of different images differ about as much as they vary within one: none is constant or runs away."""
    with torch.no_grad():
        fine, middle, queries, memory = model.conditioning.split(model.advance(clips(4), IMAGES, 0))
    for part in (fine, middle, queries, memory):
        assert 0.1 < part.std() < 10
        assert part.std(dim=0).mean() > 0.1 * part.std()


def test_a_saved_sam2_is_found_loaded_and_named_by_its_bytes(files: Sam2Files, tmp_path: Path) -> None:
    sam = load_sam2(files, 96)
    sam.save_pretrained(tmp_path)
    found = find_sam2(str(tmp_path))
    assert (found.layers, found.drawn, found.mean) == (4, False, (0.485, 0.456, 0.406))
    loaded = load_sam2(found, SIZE)
    for name, tensor in sam.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    digest = found.weights_digest()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert find_sam2(str(tmp_path)).weights_digest() != digest
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BackboneError, match=r"config\.json and model\.safetensors in .* cannot be loaded"):
        load_sam2(find_sam2(str(tmp_path)), SIZE)


def test_weights_of_another_shape_than_the_config_are_refused(files: Sam2Files, tmp_path: Path) -> None:
    load_sam2(files, 96).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"memory_attention_num_layers": 5}))
    with pytest.raises(BackboneError, match=r"disagree on 26 tensors, first 'memory_attention\.layers\.4"):
        load_sam2(find_sam2(str(tmp_path)), SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2"}, "architecture 'dinov2'; expected one of sam2_video"),
        ({"memory_encoder_output_channels": 32}, "memory_encoder_output_channels is 32 .*takes 64"),
    ],
)
def test_another_model_is_refused_before_it_is_loaded(tmp_path: Path, change: dict[str, object], message: str) -> None:
    shutil.copytree(DRAWN["tiny-sam2"], tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | change))
    (tmp_path / "other/model.safetensors").write_bytes(b"")
    with pytest.raises(BackboneError, match=message):
        find_sam2(str(tmp_path / "other"))


def test_a_folder_without_weights_and_a_name_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no model\.safetensors in"):
        find_sam2(str(DRAWN["tiny-sam2"]))
    with pytest.raises(BackboneError, match="no such folder; expected a folder, a hub id owner/name, or tiny-sam2"):
        find_sam2(str(tmp_path / "none"))


@pytest.mark.parametrize("size", [64, 96, 128])
def test_sizes_that_the_windows_tile_are_taken(files: Sam2Files, size: int) -> None:
    files.check_image_size(size)
    model = ClipSegmenter(load_sam2(files, size), 1).eval()
    with torch.no_grad():
        out = model.predict(model.advance(torch.zeros(1, 7, size, size), IMAGES, FEATURES), prompts(1)[:, :1])
    assert out.shape == (1, 1, 2, size // 4, size // 4)


def test_other_sizes_are_refused_with_one_that_would_do(files: Sam2Files) -> None:
    with pytest.raises(BackboneError, match=r"dataset\.image_size: 100 px; .*multiples of 32 px, such as 96"):
        files.check_image_size(100)


# --------------------------------------------------------------------------------------------------------------- costs


def counted(model: nn.Module, run: object) -> float:
    """Thousands of multiply-accumulates of a call, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops() / 2 / 1000


def test_costs_are_what_torch_counts(files: Sam2Files) -> None:
    """With attention written out: torch does not count its own fused kernels on a CPU."""
    sam = load_sam2(files, SIZE)
    sam.set_attn_implementation("eager")
    sam.config.mask_decoder_config._attn_implementation = "eager"
    model = ClipSegmenter(sam, STRUCTURES).eval().requires_grad_(False)
    costs = sam2_costs(files, ClipShape(SIZE, STRUCTURES, PROMPTS))
    x = torch.zeros(1, 9, SIZE, SIZE)
    tokens, features = model.advance(x, IMAGES, 0), model.advance(x, IMAGES, FEATURES)
    assert costs.embedding == pytest.approx(counted(model, lambda: model.advance(x, IMAGES, 0)), rel=0.03)
    assert costs.blocks[0] == pytest.approx(counted(model, lambda: model.advance(tokens, 0, 1)), rel=0.01)
    side = prompts(1).clone().requires_grad_()  # torch's counter hooks into autograd
    assert costs.head == pytest.approx(counted(model, lambda: model.predict(features, side)), rel=0.05)
    assert costs.token_values[0] == tokens.shape[1]
    assert costs.feature_values == features.shape[1]


def test_the_published_sizes_are_counted_right_from_a_config_that_says_nothing(tmp_path: Path) -> None:
    """facebook/sam2.1-hiera-tiny is transformers' default; libraries count 38.96 M parameters, 5.92 M in the layers."""
    Sam2VideoConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    found = find_sam2(str(tmp_path))
    costs = sam2_costs(found, ClipShape(1024, STRUCTURES, PROMPTS))
    with torch.device("meta"):
        sam = Sam2VideoModel(Sam2VideoConfig())
    assert len(costs.blocks) == 4
    layers = sum(p.numel() for p in sam.memory_attention.layers.parameters())
    assert sum(costs.block_parameters) == pytest.approx(layers, rel=0.01)
    decoder = sum(p.numel() for p in sam.mask_decoder.parameters())
    assert costs.head_parameters == pytest.approx(decoder, rel=0.02)


def test_the_defaults_of_a_config_are_those_of_transformers() -> None:
    def check(ours: dict[str, object], theirs: object) -> None:
        for key, value in ours.items():
            if isinstance(value, dict):
                check(value, getattr(theirs, key))
            else:
                assert getattr(theirs, key) == value, key

    check(sam2_files._DEFAULTS, Sam2VideoConfig())


def test_facts_of_the_kind_change_with_what_chooses_masks_and_memory() -> None:
    def shape(**groups: dict[str, object]) -> str:
        settings = segmentation_settings(**groups)
        return TASKS["segmentation"].facts(settings, settings.segmentation.structures, False).shape_digest

    same = shape()
    assert shape(optimiser={"batch_size": 4}, segmentation={"focal_gain": 1.0}) == same
    changed = [
        shape(segmentation={"structures": ("heart",)}),
        shape(segmentation={"masks": "t.csv"}),
        shape(segmentation={"min_mask_quality": 0.8}),
    ]
    assert len({same, *changed}) == 4
