"""The objectives against other implementations of them: diffusers' schedulers, transformers' own loss, the reference's ids."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blip3o_core.data.prepare import LABELS, Augmentation, Preparer, changed_cells, label_shares
from blip3o_core.data.sample import Sample
from blip3o_core.errors import ConfigError, InputError
from blip3o_core.images import qwen_pixel_values
from blip3o_core.models.layers import attend
from blip3o_core.models.nextdit import NextDiT, NextDiTConfig
from blip3o_core.prompts import TRAINED_PROMPT_TOKENS
from blip3o_core.sampling.discrete_euler import signal_rates
from blip3o_core.train.config import ObjectiveOptions
from blip3o_core.train.contrastive import contrastive_objective, distance_from_white
from blip3o_core.train.cpu_attention import attend_written_out
from blip3o_core.train.denoising import denoising_timesteps
from blip3o_core.train.local_attention import condition_attention_loss, own_tokens
from blip3o_core.train.losses import answer_cross_entropy, flow_levels, flow_matching
from blip3o_core.train.noise import Draw, condition_noise, flow_draws
from blip3o_core.train.validation import validation_losses
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from .training_samples import DATA, Prepared, prepare, training_config, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def tokenizer():
    return Blip3oCheckpoint.open(DATA / "checkpoint").tokenizer


def full(data: Path, output: Path, part: str, task: str, *overrides: str) -> Prepared:
    return prepare(training_config(data, output, [task], "train.method=full", f'train.parts=["{part}"]', *overrides))


def draws(count: int, **settings) -> list[Draw]:
    return [Draw((7, index), **settings) for index in range(count)]


# noise levels


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_levels(mean, std):
    u = flow_draws(draws(4000), (1,), timesteps="logit_normal", logit_mean=mean, logit_std=std).u.double()
    logits = torch.log(u / (1 - u))
    assert logits.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(4000))
    assert logits.std().item() == pytest.approx(std, rel=4 / math.sqrt(8000))


def test_uniform_levels():
    u = flow_draws(draws(4000), (1,), timesteps="uniform").u
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=4 * 0.2887 / math.sqrt(4000))
    assert u.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)


def test_a_level_never_rounds_to_one():
    """At u = 1 the schedule of the decoder has no timestep, and flow matching no noise."""
    u = flow_draws(draws(50), (1,), timesteps="logit_normal", logit_mean=40.0, logit_std=0.1).u
    assert u.max() < 1 and flow_levels(u).min() == pytest.approx(1e-3) and denoising_timesteps(u).min() == 0


def test_shift_of_the_levels():
    """As SD3 and diffusers' FlowMatchEulerDiscreteScheduler shift them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    u = torch.arange(1000) / 1000 + 1e-5
    wanted = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).sigmas
    assert torch.allclose(flow_levels(u, shift=3.0), wanted, atol=1e-6)


def test_condition_dropout_is_a_rate_per_sample_and_off_in_validation():
    kept = flow_draws(draws(4000), (1,), timesteps="uniform", condition_dropout=0.1).kept
    assert set(kept.tolist()) == {0.0, 1.0}
    assert 1 - kept.mean().item() == pytest.approx(0.1, abs=4 * 0.3 / math.sqrt(4000))
    assert flow_draws(draws(50, training=False), (1,), timesteps="uniform", condition_dropout=1.0).kept.all()


def test_large_u_is_little_noise_in_both_objectives():
    u = torch.tensor([0.0, 0.5, 0.9999])
    assert (flow_levels(u).diff() < 0).all() and (denoising_timesteps(u).diff() < 0).all()
    assert denoising_timesteps(u).tolist() == [999, 499, 0]


# the decoder's denoising


def test_the_denoising_schedule_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    assert torch.equal(signal_rates(), scheduler(DDPMScheduler).alphas_cumprod)


def scheduler(cls):
    """Of the decoder's own scheduler_config.json."""
    import json

    fields = json.loads((DATA / "checkpoint/diffusion-decoder/scheduler/scheduler_config.json").read_text())
    return cls.from_config({key: value for key, value in fields.items() if not key.startswith("_") and key != "timestep_type"})


@pytest.mark.parametrize("noisy_weight", [1, 4])
def test_the_denoising_loss_is_the_one_built_by_hand(noisy_weight, data, tmp_path, relative_error):
    from diffusers import DDPMScheduler

    prepared = full(data, tmp_path / "out", "decoder", "decode", "objective.condition_dropout=0.5",
                    f"objective.noisy_weight={noisy_weight}")  # fmt: skip
    model, frozen, examples = prepared.model, prepared.frozen, prepared.examples * 3
    own = draws(len(examples))
    losses = model(examples, own)

    drawn = flow_draws(own, (4, 16, 16), timesteps="uniform", condition_dropout=0.5)
    assert 0 < drawn.kept.sum() < len(own)  # both branches
    wanted = []
    for index, example in enumerate(examples):
        latents = frozen.vae.encode(example.picture[None]).latent_dist.mode() * frozen.vae.config.scaling_factor
        pixels = example.target_pixels if drawn.kept[index] else torch.zeros_like(example.target_pixels)
        context = frozen.vision_encoder(pixels[None]).flatten(2).transpose(1, 2)
        timestep = denoising_timesteps(drawn.u[index : index + 1])
        noisy = scheduler(DDPMScheduler).add_noise(latents, drawn.noise[index : index + 1], timestep)
        time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 32.0, 32.0]])
        predicted = model.unet(noisy, timestep, encoder_hidden_states=context,
                               added_cond_kwargs={"text_embeds": context.mean(dim=1), "time_ids": time_ids}).sample  # fmt: skip
        weight = min(noisy_weight, 1 / scheduler(DDPMScheduler).alphas_cumprod[timestep].item())
        wanted.append(weight * F.mse_loss(predicted, drawn.noise[index : index + 1]))
    assert relative_error(losses, torch.stack(wanted)) <= 1e-5


def test_noise_on_embeddings_is_of_any_deviation_up_to_the_one_given(data, tmp_path, relative_error):
    noise = condition_noise(draws(400), (5000,), 0.8)
    deviations = noise.std(dim=1)
    assert deviations.min() < 0.02 and 0.76 < deviations.max() < 0.85 and abs(deviations.mean() - 0.4) < 0.05
    assert torch.equal(noise[7:9], condition_noise(draws(9)[7:], (5000,), 0.8))
    assert not condition_noise(draws(2, training=False), (5000,), 0.8).any()

    noisy = full(data, tmp_path / "out", "decoder", "decode", "objective.embedding_noise=0.8", "objective.condition_dropout=0")
    plain = full(data, tmp_path / "out", "decoder", "decode", "objective.condition_dropout=0")
    own = draws(len(noisy.examples))
    embeddings = plain.model.targets(plain.examples)
    disturbed = embeddings + condition_noise(own, embeddings.shape[1:], 0.8)
    plain.model.targets = lambda examples: disturbed
    assert relative_error(noisy.model(noisy.examples, own), plain.model(plain.examples, own)) <= 1e-5


def test_heads_pay_for_looking_elsewhere(data, tmp_path, relative_error):
    """Against the attention weights that diffusers computes."""
    prepared = full(data, tmp_path / "out", "decoder", "decode", "objective.local_attention_weight=2")
    plain = full(data, tmp_path / "out", "decoder", "decode")
    model, own = prepared.model, draws(len(prepared.examples))
    weights = []

    def record(attention, args, options):
        query = attention.head_to_batch_dim(attention.to_q(args[0]))
        key = attention.head_to_batch_dim(attention.to_k(options["encoder_hidden_states"]))
        weights.append(attention.get_attention_scores(query, key).unflatten(0, (-1, attention.heads))[:, 0])  # (B, N, 64)

    for name, module in model.unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        both = model(prepared.examples, own)
        without = plain.model(prepared.examples, own)
    assert len(weights) > 2
    wanted = []
    for found in weights:
        side = math.isqrt(found.shape[1])
        shares = [found.unflatten(-1, (8, 8))[:, row * side + column, row * 8 // side : (row + 1) * 8 // side,
                                              column * 8 // side : (column + 1) * 8 // side].sum(dim=(1, 2))
                  for row in range(side) for column in range(side)]  # fmt: skip
        wanted.append(-torch.stack(shares).log().mean(dim=0))
    assert relative_error(both - without, 2 * torch.stack(wanted).mean(dim=0)) <= 1e-4


def test_the_dit_pays_for_looking_at_other_queries(relative_error):
    """Against the attention of a forward pass whose queries are the same for every token but for their position."""
    torch.manual_seed(0)
    dit = NextDiT(NextDiTConfig(in_channels=4, dim=32, num_layers=3, num_heads=2, ffn_dim=32, conditioning_dim=8, context_dim=12))
    for layer in dit.layers:
        torch.nn.init.zeros_(layer.gate)
        torch.nn.init.zeros_(layer.attn2.to_q.weight)
        torch.nn.init.normal_(layer.attn2.norm_q.bias)
    states, shares = torch.randn(3, 64, 12), []

    def record(q, k, v):
        shares.append((q[:, 0] @ k[:, 0].transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1).diagonal(dim1=1, dim2=2))  # (B, N)
        return attend(q, k, v)

    with torch.no_grad():
        dit(torch.randn(3, 4, 8, 8), torch.full((3,), 500.0), states, attend=record)
        losses = condition_attention_loss(dit, states)
    assert losses.shape == (3,) and len(shares) == 6
    assert relative_error(losses, -torch.stack(shares[1::2]).log().mean(dim=(0, 2))) <= 1e-5  # self- and cross-attention take turns


@pytest.mark.parametrize(("positions", "height", "width", "counts"), [
    (16, 16, 16, {4}), (64, 8, 8, {1}), (256, 16, 16, {1}), (8, 4, 8, {8}), (72, 24, 12, {1, 2, 4}),
])  # fmt: skip
def test_own_tokens_of_maps_of_any_size(positions, height, width, counts):
    own = own_tokens(positions, height, width, 8)
    assert own.shape == (positions, 64) and own.any(dim=0).all()
    assert set(own.sum(dim=1).tolist()) == counts


@pytest.mark.parametrize("index", [0, 3, 7])
def test_one_euler_step_with_the_true_noise_recovers_the_latent(index):
    """What training calls noise is what the sampler of the decoder takes away."""
    from diffusers import EulerDiscreteScheduler

    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    sampler = scheduler(EulerDiscreteScheduler)
    sampler.set_timesteps(8)
    timestep = sampler.timesteps[index]
    rate = signal_rates()[timestep.long()]
    trained_on = rate.sqrt() * latent + (1 - rate).sqrt() * noise
    sample = trained_on / rate.sqrt()  # the sampler's scale: latent + sigma * noise
    assert torch.allclose(sampler.scale_model_input(sample, timestep), trained_on, atol=1e-5)
    step = sampler.step(noise, timestep, sample)
    assert torch.allclose(step.pred_original_sample, latent, atol=2e-5)
    if index == 7:
        assert torch.allclose(step.prev_sample, latent, atol=2e-5)


# flow matching


def test_a_loss_depends_on_its_sample_alone(data, tmp_path, relative_error):
    prepared = prepare(training_config(data, tmp_path / "out", ["text_to_image", "edit", "understand", "text"],
                                       'lora.parts=["dit","language_model"]'))  # fmt: skip
    together = prepared.losses()
    alone = torch.cat([prepared.model([example], [draw]) for example, draw in zip(prepared.examples, prepared.draws, strict=True)])
    backwards = prepared.model(prepared.examples[::-1], prepared.draws[::-1]).flip(0)
    assert relative_error(together, alone) <= 1e-5 and relative_error(backwards, alone) <= 1e-5


def test_flow_matching_of_a_perfect_and_of_a_blind_network():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    u = torch.tensor([0.1, 0.5, 0.9])
    assert flow_matching(lambda x, t: noise - data, data, noise, u).abs().max() == 0
    assert torch.allclose(flow_matching(lambda x, t: torch.zeros_like(x), data, noise, u), (noise - data).square().mean(dim=(1, 2, 3)))


def test_dropped_conditions_are_zero_states(data, tmp_path):
    prepared = prepare(training_config(data, tmp_path / "out", ["text_to_image"], "objective.condition_dropout=1"), per_task=1)
    seen = []
    handle = prepared.model.dit.caption_projection.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    prepared.losses()
    handle.remove()
    assert seen[0].abs().max() == 0


@pytest.mark.parametrize(("part", "task"), [("dit", "text_to_image"), ("decoder", "decode")])
def test_several_draws_of_a_sample_are_so_many_samples(part, task, data, tmp_path, relative_error):
    prepared = full(data, tmp_path / "out", part, task, "objective.draws_per_sample=3", "objective.condition_dropout=0.5")
    own = draws(len(prepared.examples))
    once = full(data, tmp_path / "out", part, task, "objective.condition_dropout=0.5").model
    alone = [once(prepared.examples, own)]
    alone += [once(prepared.examples, [Draw((*draw.seed, number)) for draw in own]) for number in (1, 2)]
    assert relative_error(prepared.model(prepared.examples, own), sum(alone) / 3) <= 1e-5
    fixed = draws(len(prepared.examples), u=0.3, training=False)
    assert torch.equal(prepared.model(prepared.examples, fixed), once(prepared.examples, fixed))


def test_regression_asks_the_states_of_the_queries_for_the_embedding(data, tmp_path, relative_error):
    """The paper's CLIP + MSE, through a linear map, beside flow matching."""
    plain = full(data, tmp_path / "out", "latent_queries", "text_to_image")
    both = full(data, tmp_path / "out", "latent_queries", "text_to_image", "objective.regression_weight=3")
    states, wanted_tokens = both.model.query_states(both.examples), both.model.targets(both.examples)
    guess = states @ both.model.embedding_head.weight.T + both.model.embedding_head.bias  # (B, 64, C)
    errors = [(guess[index, row * 8 + column] - wanted_tokens[index, :, row, column]).square().mean()
              for index in range(len(both.examples)) for row in range(8) for column in range(8)]  # fmt: skip
    wanted = 3 * torch.stack(errors).view(-1, 64).mean(dim=1)
    assert relative_error(both.losses() - plain.losses(), wanted) <= 1e-4
    assert plain.model.embedding_head is None


def test_states_of_the_queries_tell_the_labels_of_what_will_be_drawn(data, tmp_path, relative_error):
    labelled = f"data.0.path={data / 'segments.tar'}"
    plain = full(data, tmp_path / "out", "latent_queries", "reconstruct", labelled)
    both = full(data, tmp_path / "out", "latent_queries", "reconstruct", labelled, "objective.label_weight=2")
    logits = both.model.query_label_head(both.model.query_states(both.examples)).split(LABELS, dim=2)  # per channel of the map
    wanted = []
    for index, example in enumerate(both.examples):
        assert example.label_shares[0, :, 1].view(8, 8)[3].gt(0.4).tolist() == [False, True, True, True, True, False, False, False]
        wanted.append(2 * sum(F.cross_entropy(own[index], example.label_shares[channel]) for channel, own in enumerate(logits)))
    assert relative_error(both.losses() - plain.losses(), torch.stack(wanted)) <= 1e-4
    both.examples[0].label_shares = None
    assert relative_error(both.losses()[:1], plain.losses()[:1]) <= 1e-6  # a sample without a map
    both.examples[1].label_shares = None
    both.losses().sum().backward()
    assert both.model.query_label_head.weight.grad is not None  # all processes have the same gradients


def test_without_draws_only_the_lessons_of_the_queries_count(data, tmp_path, relative_error):
    lessons = "objective.regression_weight=3"
    plain = full(data, tmp_path / "out", "latent_queries", "text_to_image")
    both = full(data, tmp_path / "out", "latent_queries", "text_to_image", lessons)
    alone = full(data, tmp_path / "out", "latent_queries", "text_to_image", lessons, "objective.draws_per_sample=0")
    assert relative_error(alone.losses(), both.losses() - plain.losses()) <= 1e-4
    assert alone.model.dit is None  # not even loaded


@pytest.mark.parametrize(("part", "task", "option", "message"), [
    ("dit", "text_to_image", "regression_weight=0", "neither DiT nor decoder learns anything"),
    ("decoder", "decode", "regression_weight=0", "neither DiT nor decoder learns anything"),
    ("latent_queries", "text_to_image", "regression_weight=0", "and so are regression_weight and label_weight"),
])  # fmt: skip
def test_without_draws_something_else_must_teach(part, task, option, message, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        full(data, tmp_path / "out", part, task, "objective.draws_per_sample=0", f"objective.{option}")


@pytest.mark.parametrize("option", ["regression_weight", "label_weight"])
def test_lessons_of_the_queries_need_a_language_side_that_trains(data, tmp_path, option):
    with pytest.raises(ConfigError, match=f"objective.{option} = 3 teaches queries and language model"):
        full(data, tmp_path / "out", "dit", "text_to_image", f"objective.{option}=3")


def test_labels_of_queries_need_whole_pictures(data, tmp_path):
    with pytest.raises(ConfigError, match="objective.label_weight needs centre crops"):
        full(data, tmp_path / "out", "latent_queries", "text_to_image", "objective.label_weight=1", "data.0.crop=random")


def test_what_an_edit_changes_weighs_more(data, tmp_path, relative_error):
    """In flow matching, regression and labels alike; samples that aren't edits are as they were."""
    lessons = ("objective.regression_weight=1", "objective.draws_per_sample=2")
    losses = {}
    for weight in (1, 2, 5):
        prepared = full(data, tmp_path / "out", "latent_queries", "edit", *lessons, f"objective.changed_weight={weight}")
        for example in prepared.examples:
            assert (example.changed is None) == (weight == 1)
            example.changed = torch.arange(64) % 8 < 2
        losses[weight] = prepared.losses()
    assert relative_error(losses[5] - losses[1], 4 * (losses[2] - losses[1])) <= 1e-3
    assert (losses[2] > losses[1]).all()
    for example in prepared.examples:
        example.changed = None  # a prompt in the same run
    assert relative_error(prepared.losses(), losses[1]) <= 1e-6


def test_cells_that_an_edit_changes_are_found_in_pictures_of_any_size():
    source = Image.new("RGB", (512, 256), "white")
    target = source.resize((256, 128))
    target.paste((255, 0, 0), (64 + 32, 16, 64 + 48, 48))  # within the centre square: column 2, rows 1 and 2
    found = changed_cells(source, target, 8).view(8, 8)
    assert found.nonzero().tolist() == [[1, 2], [2, 2]]
    noise = np.random.default_rng(0).integers(0, 12, (256, 512, 3))
    noisy = Image.fromarray((np.asarray(source) - noise).astype(np.uint8))
    assert not changed_cells(source, noisy, 8).any()


def test_weights_of_changes_need_edits(data, tmp_path):
    with pytest.raises(ConfigError, match="objective.changed_weight = 2 weighs what edits change, but no dataset has the task edit"):
        full(data, tmp_path / "out", "latent_queries", "text_to_image", "objective.changed_weight=2")


# cross-entropy


def test_answers_cost_what_transformers_says(data, tmp_path, relative_error):
    """Qwen2_5_VLForConditionalGeneration with labels on the learned tokens: one conversation with two pictures and two answers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    prepared = full(data, tmp_path / "out", "backbone", "understand")
    source = prepared.opened.sources.checkpoint
    turns = (("system", "Be short."), ("user", "Which colours?"), ("assistant", "red and blue"), ("user", "Sure?"), ("assistant", "yes"))
    pictures = tuple(data / "pictures" / f"{number}.png" for number in (0, 2))
    example = prepared.opened.sets.preparers[0](Sample("talk", "understand", turns=turns, images=pictures), 0)
    ours = prepared.model([example], draws(1))

    vision = dict(source.config["vision_config"])
    vision = {key: value for key, value in vision.items() if key not in ("model_type", "in_chans", "spatial_patch_size")}
    special = {key: source.config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    config = Qwen2_5_VLConfig(text_config=source.text_config.to_dict(), vision_config=vision, tie_word_embeddings=False, **special)
    config._attn_implementation = "eager"
    network = Qwen2_5_VLForConditionalGeneration(config).eval()
    network.model.language_model.load_state_dict(prepared.model.backbone.language_model.state_dict())
    network.model.visual.load_state_dict(prepared.frozen.vision_tower.network.state_dict())
    network.lm_head.load_state_dict(prepared.model.output_head.state_dict())
    ids = torch.tensor([example.ids])
    labels = torch.where(torch.tensor([example.learned]), ids, -100)
    extra = {"mm_token_type_ids": (ids == source.tokenizer.image_pad_id).int()}
    theirs = network(input_ids=ids, labels=labels, pixel_values=example.pixel_values, image_grid_thw=example.grid_thw, **extra).loss
    assert relative_error(ours[0], theirs) <= 1e-5


def test_positions_may_count_up_through_pictures_as_in_drawing(data, tmp_path, relative_error):
    prepared = full(data, tmp_path / "out", "backbone", "understand", "objective.counted_positions=1")
    model, [example] = prepared.model, prepared.examples[:1]
    row = model.backbone.embed(example.ids, device=model.device, dtype=torch.float32, image_token_id=model.image_pad_id,
                               image_features=model.image_features([example])[0])  # fmt: skip
    logits = model.output_head(model.backbone.decode(row[None], torch.arange(len(row)).expand(3, 1, -1)))[0]
    learned = [at for at, is_learned in enumerate(example.learned) if is_learned]
    wanted = F.cross_entropy(logits[[at - 1 for at in learned]], torch.tensor([example.ids[at] for at in learned]))
    assert relative_error(model([example], draws(1))[0], wanted) <= 1e-5
    assert relative_error(model([example], draws(1, training=False))[0], wanted) > 1e-4  # validation asks as chats do


def test_learned_tokens_are_the_answers_and_their_ends(tokenizer):
    turns = (("user", "What is this?"), ("assistant", "a red square"), ("user", "Sure?"), ("assistant", "yes"))
    ids, learned = tokenizer.conversation_ids(turns, [4, 6])
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 4
            + "<|vision_end|><|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"
            "a red square<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")  # fmt: skip
    assert ids == tokenizer.trusted_ids(text)
    end = tokenizer.special_id("<|im_end|>")
    answers = [*tokenizer.trusted_ids("a red square"), end, *tokenizer.trusted_ids("yes"), end]
    assert [token for token, is_learned in zip(ids, learned, strict=True) if is_learned] == answers


def test_a_system_turn_replaces_the_usual_one(tokenizer):
    ids, _ = tokenizer.conversation_ids((("system", "Be rude."), ("user", "Hi"), ("assistant", "no")))
    text = "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    assert ids == tokenizer.trusted_ids(text)


def test_cross_entropy_is_a_mean_per_conversation():
    logits, ids = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 4, 5])
    losses = answer_cross_entropy(logits, ids, [2, 3])
    assert torch.allclose(losses, torch.stack([F.cross_entropy(logits[:2], ids[:2]), F.cross_entropy(logits[2:], ids[2:])]))


# prompts


@pytest.mark.parametrize("caption", ["a cat", "a cat. " * 200, ""])
def test_the_reference_form_gives_the_reference_ids(caption, tokenizer):
    """SPEC 3.5 and 10.4: the closed turn, cut after 447 ids, then [IMG]."""
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPlease generate image based on the following "
            f"caption: {caption}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n")  # fmt: skip
    whole = tokenizer.trusted_ids(text)
    assert (len(whole) > TRAINED_PROMPT_TOKENS) == (len(caption) > 100) and TRAINED_PROMPT_TOKENS == 512 - 65
    assert tokenizer.training_ids(caption, closed=True) == [*whole[:447], tokenizer.image_start_id]


def test_the_inference_form_is_that_of_drawing(tokenizer):
    assert tokenizer.training_ids("a cat") == tokenizer.generation_ids("a cat")
    assert tokenizer.training_ids("make it red", image_tokens=[256]) == tokenizer.generation_ids("make it red", image_tokens=[256])


def test_pictures_of_a_prompt_are_never_cut(tokenizer):
    """447 ids are room for one picture, as in the reference; each further one brings its own."""
    one, two = (tokenizer.training_ids("words " * 500, image_tokens=[256] * count) for count in (1, 2))
    assert len(one) == 448 and one.count(tokenizer.image_pad_id) == 256
    assert len(two) == 448 + 258 and two.count(tokenizer.image_pad_id) == 512


@pytest.mark.parametrize("task", ["text_to_image", "edit"])
def test_a_dropped_caption_is_empty(task, tokenizer, data):
    picture = data / "pictures/0.png"
    preparer = Preparer(tokenizer, Augmentation(trigger="xyz", caption_dropout=1.0), seed=0, eva_size=448)
    sample = Sample("a", task, text="a cat", images=(picture,) if task == "edit" else (), target=picture)
    counts = [256] if task == "edit" else []
    assert preparer(sample, 0).ids == tokenizer.training_ids("", image_tokens=counts)
    kept = Preparer(tokenizer, Augmentation(trigger="xyz"), seed=0, eva_size=448)(sample, 0)
    assert kept.ids == tokenizer.training_ids("xyz, a cat", image_tokens=counts)


def test_the_form_of_the_prompt_reaches_the_data(data, tmp_path, tokenizer):
    for form, closed in (("inference", False), ("reference", True)):
        prepared = prepare(training_config(data, tmp_path / "out", ["text_to_image"], f"train.prompt_form={form}"), per_task=1)
        assert prepared.examples[0].ids == tokenizer.training_ids("a red square", closed=closed)


# autoencode


def test_thumbnails_have_to_be_found_in_the_latents(data, tmp_path, relative_error):
    both = full(data, tmp_path / "out", "vae", "autoencode", "objective.thumbnail_weight=3")
    plain = full(data, tmp_path / "out", "vae", "autoencode")
    head = both.model.thumbnail_head
    wanted = []
    for example in both.examples:
        latents = both.model.vae.encode(example.picture[None]).latent_dist.mean[0]  # (4, h, w)
        side = example.picture.shape[-1] // latents.shape[-1]
        small = example.picture.unfold(1, side, side).unfold(2, side, side).mean(dim=(3, 4))
        guess = torch.einsum("oc,chw->ohw", head.weight[:, :, 0, 0], latents) + head.bias[:, None, None]
        wanted.append(3 * (guess - small).square().mean())
    assert relative_error(both.losses() - plain.losses(), torch.stack(wanted)) <= 1e-4
    assert plain.model.thumbnail_head is None


# segment


def test_shares_of_labels_in_the_cells():
    labels = Image.new("RGB", (56, 28))
    labels.paste((3, 0, 15), (14, 0, 28, 28))  # half of the first cell
    shares = label_shares(labels, 1, 2)
    assert shares.shape == (3, 2, LABELS)
    assert shares[0, 0, 3] == shares[0, 0, 0] == shares[2, 0, 15] == 0.5
    assert (shares[:, 1, 0] == 1).all() and shares[1, 0, 0] == 1 and (shares.sum(dim=2) == 1).all()
    with pytest.raises(InputError, match="a map of labels holds 16; labels are 0 to 15"):
        label_shares(Image.new("RGB", (28, 28), (16, 0, 0)), 1, 1)


def test_the_loss_of_labels_is_a_cross_entropy_in_every_cell(data, tmp_path, relative_error):
    prepared = full(data, tmp_path / "out", "vision", "segment")
    model, examples = prepared.model, prepared.examples
    for example, found in zip(examples, prepared.losses(), strict=True):
        logits = model.segmentation_head(model.image_features([example])[0])  # (cells, 5 * LABELS): of all channels
        parts = [F.cross_entropy(own, example.label_shares[channel]) for channel, own in enumerate(logits.split(LABELS, dim=1)[:3])]
        assert relative_error(found, sum(parts)) <= 1e-5
    rows = examples[0].label_shares[1].view(*(int(length) // 2 for length in examples[0].grid_thw[0, 1:]), LABELS)
    assert rows[0, 0, 0] > 0.5 and rows[0, -1, 0] > 0.8  # the square is left of the middle
    assert rows[0, 0, 1:].sum() > 0.3


def test_where_the_language_model_trains_its_states_tell_the_labels_and_the_place(data, tmp_path, relative_error):
    prepared = full(data, tmp_path / "out", "backbone", "segment")
    model, [example] = prepared.model, prepared.examples[:1]
    rows, columns = (int(length) // 2 for length in example.grid_thw[0, 1:])
    row = model.backbone.embed(example.ids, device=model.device, dtype=torch.float32, image_token_id=model.image_pad_id,
                               image_features=model.image_features([example])[0])  # fmt: skip
    start = example.ids.index(model.image_pad_id)
    assert example.ids[start : start + rows * columns] == [model.image_pad_id] * rows * columns
    places = [(0, index // columns, index % columns) for index in range(rows * columns)]
    positions = torch.tensor([(at, at, at) for at in range(start)] + [(start + t, start + r, start + c) for t, r, c in places]).T[:, None]
    states = model.backbone.decode(row[None, : start + rows * columns], positions)[0, start:]
    parts = model.segmentation_head(states).split(LABELS, dim=1)
    wanted = [F.cross_entropy(part, example.label_shares[channel]) for channel, part in enumerate(parts[:3])]
    wanted += [F.cross_entropy(part, torch.tensor([place[axis] for place in places])) for axis, part in ((1, parts[3]), (2, parts[4]))]
    assert relative_error(model([example], draws(1))[0], sum(wanted)) <= 1e-5


def test_where_the_clip_encoder_trains_its_tokens_tell_the_labels(data, tmp_path, relative_error):
    prepared = full(data, tmp_path / "out", "clip", "segment")
    model, examples = prepared.model, prepared.examples
    for example, found in zip(examples, prepared.losses(), strict=True):
        logits = model.segmentation_head(model.vision_encoder(example.target_pixels[None])[0].flatten(1).T)  # (64 tokens, 5 * LABELS)
        parts = [F.cross_entropy(own, example.label_shares[channel]) for channel, own in enumerate(logits.split(LABELS, dim=1)[:3])]
        assert relative_error(found, sum(parts)) <= 1e-5
    shown = examples[0].label_shares[0, :, 1].view(8, 8)  # how much of each token's cell the square covers
    # 96 x 80 pixels, of which EVA-CLIP sees the 80 in the middle: cells of 10; the square goes from 12 to 52 and from 15 to 65
    assert shown[3].gt(0.4).tolist() == [False, True, True, True, True, False, False, False]
    assert shown[:, 3].gt(0.4).tolist() == [False, True, True, True, True, True, True, False]


def test_labels_teach_one_side_at_a_time(data, tmp_path):
    config = training_config(data, tmp_path / "out", ["segment"], "train.method=full", 'train.parts=["clip","vision"]')
    with pytest.raises(ConfigError, match="the task segment teaches either clip or the networks of the backbone"):
        prepare(config)


# contrast


def test_the_contrastive_loss_is_clips(data, tmp_path, relative_error):
    """arXiv:2103.00020, fig. 3: pictures and texts of different samples, both ways."""
    prepared = full(data, tmp_path / "out", "clip", "contrast")
    model, examples = prepared.model, prepared.examples
    pixels = torch.stack([example.target_pixels for example in examples])
    images = model.text_tower.project_images(model.vision_encoder(pixels))
    logits = model.text_tower.scale * model.text_tower([example.ids for example in examples]) @ images.T
    right = torch.arange(len(examples))
    wanted = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    assert relative_error(prepared.losses().mean(), wanted) <= 1e-5
    assert torch.allclose(images.norm(dim=-1), torch.ones(len(examples)))


def test_equal_captions_are_equally_right(data, tmp_path):
    prepared = full(data, tmp_path / "out", "clip", "contrast")
    twice = [prepared.examples[0]] * 2
    losses = contrastive_objective(ObjectiveOptions())(prepared.model, twice, draws(2))
    assert torch.allclose(losses, torch.full((2,), math.log(2)))  # they can't be told apart, and need not be


def test_validation_of_a_contrast_compares_different_pictures(data, tmp_path):
    prepared = full(data, tmp_path / "out", "clip", "contrast")
    batches = []
    prepared.model.objectives["contrast"] = lambda model, examples, _: batches.append(examples) or torch.ones(len(examples))
    assert validation_losses(prepared.model, prepared.examples, timesteps=4, batch_size=4, seed=0) == {"contrast": (2.0, 2)}
    assert [[example.name for example in batch] for batch in batches] == [[example.name for example in prepared.examples]]


def test_pictures_of_conversations_are_as_in_chats(data, tmp_path):
    from PIL import Image

    prepared = full(data, tmp_path / "out", "vision", "understand")
    pixels, grid = qwen_pixel_values([Image.open(data / "pictures/0.png")], min_pixels=784, max_pixels=3136)
    assert torch.equal(prepared.examples[0].pixel_values, pixels) and torch.equal(prepared.examples[0].grid_thw, grid)


def test_embeddings_may_have_to_keep_the_pixels(data, tmp_path, relative_error):
    prepared = full(data, tmp_path / "out", "clip", "contrast", "objective.pixel_weight=3")
    model, examples = prepared.model, prepared.examples
    with torch.no_grad():
        plain, with_pixels = (contrastive_objective(ObjectiveOptions(pixel_weight=weight))(model, examples, draws(2))
                              for weight in (0.0, 3.0))  # fmt: skip
        pixels = torch.stack([example.target_pixels for example in examples])
        embeddings = model.vision_encoder(pixels)
        tower = model.text_tower.pixel_projection
        side = pixels.shape[-1] // 8
    for index in range(2):
        guess = torch.empty_like(pixels[index])
        for row in range(8):
            for column in range(8):  # each block from the token above it, channel by channel
                block = tower(embeddings[index, :, row, column]).view(3, side, side)
                guess[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = block
        error = (guess - pixels[index]).square().mean()
        assert relative_error(with_pixels[index] - plain[index], 3 * error) <= 1e-4
    assert full(data, tmp_path / "other", "clip", "contrast").model.text_tower.pixel_projection is None


def test_white_embeddings_cost_nothing_and_others_their_distance():
    tokens = torch.randn(3, 64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = tokens - tokens.mean(dim=0) - (tokens.mean(dim=1, keepdim=True) - tokens.mean(dim=(0, 1)))
    tokens, _ = torch.linalg.qr(tokens.flatten(0, 1))
    white = (tokens * math.sqrt(len(tokens))).view(3, 8, 8, 6).permute(0, 3, 1, 2)
    assert distance_from_white(white).item() == pytest.approx(0, abs=1e-12)
    assert distance_from_white(2 * white).item() == pytest.approx(9)  # (4 - 1) squared in each of 6 channels, per channel
    same = torch.randn(6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert distance_from_white(white + same).item() == pytest.approx(0, abs=1e-12), "what all pictures have in common is free"
    grounds = torch.tensor([1.0, -2, 3], dtype=torch.float64).view(3, 1, 1, 1)
    assert distance_from_white(white + grounds).item() == pytest.approx(0, abs=1e-12), "and what all places of one have"
    twice = torch.cat((white[:, :3], white[:, :3]), dim=1)
    assert distance_from_white(twice).item() == pytest.approx(1), "channels that say the same do too"


# attention on the CPU


def test_attention_written_out_is_that_of_torch():
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(attend_written_out(q, k, v), attend(q, k, v), rtol=0, atol=1e-6)  # measured 2e-7
    short_k, short_v = k[:, :, :5], v[:, :, :5]
    torch.testing.assert_close(attend_written_out(q, short_k, short_v), attend(q, short_k, short_v), rtol=0, atol=1e-6)


def test_every_network_that_trains_on_the_cpu_has_its_attention_written_out(data, tmp_path):
    decoder = full(data, tmp_path / "decoder", "decoder", "decode").model.unet
    assert {type(processor).__name__ for processor in decoder.attn_processors.values()} == {"AttnProcessor"}
    backbone = full(data, tmp_path / "backbone", "backbone", "text").model.backbone
    assert backbone.language_model.config._attn_implementation == "eager"
