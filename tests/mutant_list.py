"""Wrong formulas, one each, and the tests that must turn red for them; see `mutants.py`."""

from __future__ import annotations

from .mutants import Mutant

SAMPLING = "samplers/test_formulas.py"
STREAM = f"{SAMPLING}::test_a_stream_is_what_the_equations_say"
STEPS = " ".join(
    f"{SAMPLING}::test_{name}"
    for name in ("one_step_by_hand", "a_linear_flow_is_followed_as_euler_follows_it")
)
LISTS = " ".join(
    f"{SAMPLING}::test_{name}"
    for name in (
        "the_list_of_four_steps_is_ltx2s",
        "the_list_of_eight_steps_halves_the_intervals_of_four",
        "the_long_list_is_ltx2s_scheduler",
        "a_shorter_sequence_shifts_the_list_less",
    )
)
NOISE = f"{SAMPLING}::test_noise_has_these_names"
CLOCK = f"{SAMPLING}::test_codec_time_is_counted_in_frames_and_samples"
LAYOUT = f"{SAMPLING}::test_blocks_hold_a_second_of_both_modalities"

LOSSES = "lab/test_formulas.py"
FLOW = (
    f"{LOSSES}::test_flow_matching_by_hand {LOSSES}::test_the_velocity_points_from_clean_to_noise"
)
MULTI = f"{LOSSES}::test_multi_step_mode_learns_the_real_block_after_the_history_that_it_is_shown"
TEACHER = f"{LOSSES}::test_a_guided_teacher_has_its_own_guidance_in_each_modality"
INTERVAL = f"{LOSSES}::test_intervals_are_whole_steps_of_the_list"
TARGET = f"{LOSSES}::test_shortcuts_target_is_the_teachers_mean_velocity"
SHORTCUT = f"{LOSSES}::test_shortcut_by_hand"
SAMPLE = f"{LOSSES}::test_a_few_step_sample_and_its_gradient_by_hand"
DMD = f"{LOSSES}::test_dmds_gradient_by_hand {LOSSES}::test_dmd_by_hand"
LEVELS = f"{LOSSES}::test_levels_of_the_scores_fill_their_range"
FAKE = f"{LOSSES}::test_the_fake_score_learns_the_flow_of_samples"
MIX = f"{LOSSES}::test_shares_of_histories_change_with_progress"
HISTORY = f"{LOSSES}::test_a_history_by_hand"
RIVAL = f"{LOSSES}::test_the_rivals_rollout_by_hand {LOSSES}::test_the_rivals_loss_by_hand"
FIRST, SECOND = f"{LOSSES}::test_stage_one_by_hand", f"{LOSSES}::test_stage_two_by_hand"
DROPPED = f"{LOSSES}::test_a_dropped_caption_is_the_empty_prompt"
WHOLE = f"{LOSSES}::test_the_bidirectional_teacher_has_one_level_and_sees_all"
NOISING = f"{LOSSES}::test_noising_and_its_inverse_block_by_block"

NETWORK = "networks/test_formulas.py"
WHOLE_PASS = f"{NETWORK}::test_a_whole_sequence_is_what_the_equations_say"
HISTORY_PASS = f"{NETWORK}::test_noisy_blocks_beside_a_clean_history_are_what_the_equations_say"
PLACES = " ".join(
    f"{NETWORK}::test_{name}"
    for name in ("latents_lie_in_the_middle_of_their_frames", "angles_at_known_places")
)
TURN = f"{NETWORK}::test_a_rotation_turns_pairs_half_a_head_apart"
FEW_STEP = f"{NETWORK}::test_few_step_adapters_act_by_half_of_guidance_above_one"
ADAPTERS = " ".join(
    f"networks/test_few_step.py::test_{name}"
    for name in (
        "passes_of_few_step_mode_alone_have_the_adapters_in_their_weights",
        "adapters_stay_beside_weights_that_are_not_there_as_they_are_multiplied",
    )
)
SIGHTS = "networks/test_picture_track.py"
SIGHT = f"{SIGHTS}::test_it_is_the_same_as_by_hand"
TOLD_SIGHT = " ".join(
    f"{SIGHTS}::test_{name}"
    for name in (
        "a_stream_that_goes_on_sees_what_it_would_have_seen_without_a_break",
        "a_stream_is_told_where_pictures_are_given_and_is_the_same_bits_elsewhere",
        "a_step_of_a_stream_is_the_pass_over_the_clip",
        "noisy_blocks_are_told_and_their_history_is_not",
    )
)
LEARNED_SIGHT = f"{SIGHTS}::test_what_is_learned_from_sees_no_sound_to_copy"
TAPE, RANKS = "networks/test_tape.py", "networks/test_tensor_parallel.py"
TIMES = f"{NETWORK}::test_times_become_128_cosines_and_128_sines"
MASKS = f"{NETWORK}::test_who_sees_whom_is_equations_3_to_5"
CODECS = "networks/test_codec_formulas.py"
CODEC_LOSSES = "lab/test_codec_formulas.py"
DRAWN = f"{CODEC_LOSSES}::test_a_decoder_learns_on_draws_from_the_encoders_distribution"
GIVEN = "samplers/test_start.py"
DECODED = "samplers/test_decode.py"
PIECES = "samplers/test_overlap.py"

MEMORY = "samplers/test_stream_memory.py"
LATER_PASS = "model_loaders/test_parity.py::test_every_quantity_is_within_the_limit"
SHIPPED = "test_golden.py::test_the_shipped_model_makes_what_it_made[few]"

WEIGHTS = "lab/test_optimiser_formulas.py"
ADAMW = f"{WEIGHTS}::test_vectors_are_stepped_by_adamw_and_cut_to_norm_one"
AVERAGE = f"{WEIGHTS}::test_the_moving_average_forgets_by_its_decay_in_every_step"
RATE = f"{WEIGHTS}::test_the_learning_rate_warms_up_and_falls_as_a_cosine"
METHOD = f"{WEIGHTS}::test_one_step_of_the_method"
ROLLED = "lab/test_mutual_forcing.py::test_a_history_rolled_out_is_what_the_sampler_generates"
PREPARE = "lab/test_mutual_forcing.py::test_few_step_mode_learns_on_some_clips_and_flow_on_all"

WRONG: list[tuple[str, str, list[tuple[str, ...]]]] = [
    (
        "samplers/steps.py",
        STEPS,
        [
            ("(1 - sigma) * clean + sigma * noise", "sigma * clean + (1 - sigma) * noise"),
            ("x - sigma * velocity", "x + sigma * velocity"),
            ("unguided + scale * (conditional", "conditional + scale * (conditional"),
            ("(conditional - unguided)", "(unguided - conditional)"),
            ("x - (sigma - next_sigma) * velocity", "x + (sigma - next_sigma) * velocity"),
            ("x - (sigma - next_sigma) * velocity", "x - next_sigma * velocity"),
            ("add_noise(clean, noise, next_sigma)", "add_noise(clean, noise, sigma)"),
        ],
    ),
    (
        "samplers/rollout.py",
        STREAM,
        [
            ("sigma - next_sigma if sampler.mode", "sigma if sampler.mode"),
            ('if sampler.mode == "few" else 0.0', 'if sampler.mode == "multi" else 0.0'),
            ("guided(rest[0][1], audio_v, sampler.guidance)", "guided(rest[0][1], audio_v, 1.0)"),
            (
                "guided(rest[0][0], video_v, sampler.guidance)",
                "guided(video_v, rest[0][0], sampler.guidance)",
            ),
            ("draw(step + 1) if next_sigma", "draw(step) if next_sigma"),
            ("clean = constants.at(0.0)", "clean = constants.at(1e-1)"),
            ('noise(index, step, "audio"', 'noise(index, step, "video"'),
        ],
    ),
    (
        "samplers/rollout.py",
        f"{SAMPLING}::test_defaults_of_both_modes",
        [
            (
                "FEW_STEPS, MULTI_STEPS, GUIDANCE = 4, 50, 3.0",
                "FEW_STEPS, MULTI_STEPS, GUIDANCE = 4, 50, 4.0",
            ),
        ],
    ),
    (
        "samplers/sigmas.py",
        LISTS,
        [
            ("BASE_SHIFT, MAX_SHIFT = 0.95, 2.05", "BASE_SHIFT, MAX_SHIFT = 0.5, 2.05"),
            ("BASE_SHIFT, MAX_SHIFT = 0.95, 2.05", "BASE_SHIFT, MAX_SHIFT = 0.95, 1.15"),
            ("TERMINAL = 0.1", "TERMINAL = 0.2"),
            ("(1.0 - TERMINAL) / rest[-1]", "(1.0 - TERMINAL) / rest[0].clamp(min=1)"),
            ("(1.0 / inner - 1.0)", "(1.0 / inner - 0.5)"),
            ("TAOMATE = (0, 17, 29, 36, 40)", "TAOMATE = (0, 10, 20, 30, 40)"),
            ("(a + b + 1) // 2", "(a + b) // 2"),
            ("round(i * FEW_STEP_GRID / steps)", "int(i * FEW_STEP_GRID / (steps + 1))"),
        ],
    ),
    (
        "samplers/noise.py",
        NOISE,
        [
            ('"/".join', '"".join'),
            ('"little") >> 1', '"little") >> 2'),
            ("_number(seed, block, step, modality)", "_number(seed, step, block, modality)"),
            ('_number(seed, "variation", variation)', "_number(seed, variation)"),
        ],
    ),
    (
        "samplers/clock.py",
        CLOCK,
        [
            ("1 + (latents - 1) * self.video_stride", "latents * self.video_stride"),
            ("1 + (latents - 1) * self.audio_stride", "latents * self.audio_stride"),
            (
                "self.samples(block), self.samples(block + 1)",
                "self.samples(block), self.samples(block) + 16000",
            ),
            ("max(blocks - start, 1)", "max(blocks - start, 0) + 1"),
            (
                "_divided_up(last_frame - 1, self.video_stride)",
                "_divided_up(last_frame, self.video_stride)",
            ),
        ],
    ),
    (
        "lab/training/pair.py",
        NOISING,
        [
            (
                "Pair(*map(add_noise, clean, noise, levels))",
                "Pair(*map(add_noise, noise, clean, levels))",
            ),
            (
                "spread(layout.audio_first, layout.audio_next)",
                "spread(layout.audio_next, layout.audio_first)",
            ),
        ],
    ),
    (
        "lab/training/pair.py",
        FLOW,
        [
            (
                "errors = [block.map(lambda d: d.square().flatten(1)",
                "errors = [block.map(lambda d: d.abs().flatten(1)",
            ),
        ],
    ),
    (
        "lab/training/flow_matching.py",
        FLOW,
        [
            ("Pair(*(e - x for e, x", "Pair(*(x - e for e, x"),
            ("torch.sigmoid(mean + spread * draws", "torch.sigmoid(mean - spread * draws"),
            ("level = history_noise * draws.uniform(1, 1)", "level = draws.uniform(1, 1)"),
        ],
    ),
    (
        "lab/training/flow_matching.py",
        WHOLE,
        [
            (
                "sample_sigma(1, sigma_mean, sigma_spread, draws).expand(-1, blocks)",
                "sample_sigma(blocks, sigma_mean, sigma_spread, draws)[:, -1:].expand(-1, blocks)",
            ),
        ],
    ),
    (
        "lab/training/system.py",
        DROPPED,
        [
            ("draws.uniform() < share", "draws.uniform() > share"),
        ],
    ),
    (
        "lab/training/distillation.py",
        TEACHER,
        [
            (
                "guided(empty.audio, conditional.audio, self.audio_guidance)",
                "guided(empty.audio, conditional.audio, self.video_guidance)",
            ),
            (
                "guided(empty.video, conditional.video, self.video_guidance)",
                "guided(conditional.video, empty.video, self.video_guidance)",
            ),
        ],
    ),
    (
        "lab/training/distillation.py",
        f"{INTERVAL} {SHORTCUT}",
        [
            ("grid[index], grid[index + 1]", "grid[index], grid[index] * 0"),
            ("grid[index], grid[index + 1]", "grid[index], grid[-1].expand_as(index)"),
        ],
    ),
    (
        "lab/training/distillation.py",
        TARGET,
        [
            ("torch.lerp(start, end, i / substeps)", "torch.lerp(end, start, i / substeps)"),
            ("for i in range(substeps + 1)", "for i in range(substeps)"),
            ("whole = blockwise(start - end, layout)", "whole = blockwise(start, layout)"),
            ("(a - b) / s for a, b, s", "(b - a) / s for a, b, s"),
        ],
    ),
    (
        "lab/training/distillation.py",
        SAMPLE,
        [
            ("lambda t: t.detach() - t", "lambda t: t - t.detach()"),
            ("lambda t: t.detach() - t", "lambda t, d=d: d * (t.detach() - t)"),
            ("torch.full_like(sigma, d))", "torch.zeros_like(sigma))"),
            (
                "step == gradient_step and torch.is_grad_enabled()",
                "step != gradient_step and torch.is_grad_enabled()",
            ),
        ],
    ),
    (
        "lab/training/distillation.py",
        DMD,
        [
            (
                "target = x.detach() - (fake - real) / scale",
                "target = x.detach() + (fake - real) / scale",
            ),
            ("(x.detach() - real).abs()", "(x.detach() - fake).abs()"),
            (
                "scale = (x.detach() - real).abs().mean(dims, keepdim=True)",
                "scale = (x.detach() - real).abs().amax(dims, keepdim=True)",
            ),
            ("return 0.5 * (x - target).square().mean()", "return (x - target).square().mean()"),
        ],
    ),
    (
        "lab/training/mutual_forcing.py",
        MULTI,
        [
            (
                "velocity(system.transformer, shown.history, x, sigma, told)",
                "velocity(system.transformer, clean, x, sigma, told)",
            ),
            (
                "velocity(system.transformer, shown.history, x, sigma, told)",
                "velocity(system.transformer, shown.history, x, sigma, told, sigma)",
            ),
        ],
    ),
    (
        "lab/training/mutual_forcing.py",
        SHORTCUT,
        [
            ("max(1, recipe.teacher_steps // steps)", "1"),
            ("(start - end) ** recipe.weighting", "start ** recipe.weighting"),
            (
                "velocity(system.transformer, history, x, start, told, start - end)",
                "velocity(system.transformer, history, x, start, told, start)",
            ),
            (
                "x = noised(clip, clip.noise(draws), start, layout)",
                "x = noised(clip, clip.noise(draws), end, layout)",
            ),
        ],
    ),
    (
        "lab/training/mutual_forcing.py",
        DMD,
        [
            ("made = sample.map(Tensor.detach)", "made = sample"),
            (
                "clean_prediction(x, real, level, layout)",
                "clean_prediction(x, real, 1 - level, layout)",
            ),
            (
                "guided_teacher(teacher, asked, recipe.guidance).velocity(history, x, level)",
                "guided_teacher(teacher, asked, (1.0, 1.0)).velocity(history, x, level)",
            ),
            (
                "fake(fake_velocity, fake, history, x, level, asked)",
                "fake(fake_velocity, teacher, history, x, level, asked)",
            ),
        ],
    ),
    (
        "lab/training/mutual_forcing.py",
        LEVELS,
        [
            ("low + (high - low) * draws", "low + high * draws"),
        ],
    ),
    (
        "lab/training/mutual_forcing.py",
        FAKE,
        [
            (
                "block_error(out, flow_target(sample, noise), layout)",
                "block_error(out, sample, layout)",
            ),
        ],
    ),
    (
        "lab/training/mutual_forcing.py",
        PREPARE,
        [
            (
                "return Shown(clean, clean, shown), Taught(rolled",
                "return Shown(clean, rolled, shown), Taught(rolled",
            ),
        ],
    ),
    (
        "lab/training/history.py",
        MIX,
        [
            ("sigmas[step] <= self.highest", "sigmas[step] >= self.highest"),
            ("ends[0] + (ends[1] - ends[0])", "ends[1] + (ends[0] - ends[1])"),
            ("share(self.real) + share(self.rollout)", "share(self.rollout)"),
        ],
    ),
    (
        "lab/training/history.py",
        HISTORY,
        [
            ("few_step_sigmas(steps)[start_step:]", "few_step_sigmas(steps)[start_step - 1 :]"),
            ("constants.at(sigma, sigma - following)", "constants.at(sigma, 0.0)"),
            ("add_noise(v, e, sigmas[0])", "add_noise(e, v, sigmas[0])"),
            ("made[len(made) - later :]", "made[1 : 1 + later]"),
        ],
    ),
    (
        "lab/training/history.py",
        ROLLED,
        [
            (
                "commit(*done, keys, constants.at(0.0), track, past)",
                "commit(*done, keys, constants.at(1.0), track, past)",
            ),
        ],
    ),
    (
        "lab/training/self_forcing.py",
        RIVAL,
        [
            (
                "renoise(a, b, sigma, following, e)",
                "renoise(a, b, following, sigma, e)",
            ),
            ("sigmas[last] - sigmas[last + 1])", "0.0)"),
            (
                "value.detach().to(like)",
                "value.to(like)",
                "it stands under no_grad, as the refresh itself does; detach says so to the reader",
            ),
            ("predicted_clean(a, b, sigmas[last])", "predicted_clean(a, b, sigmas[last + 1])"),
            (
                "draw_level(1, recipe, draws).expand(-1, block_count(sample, layout))",
                "draw_level(block_count(sample, layout), recipe, draws)",
            ),
        ],
    ),
    (
        "lab/training/self_forcing.py",
        FIRST,
        [
            ("sigmas[step] - sigmas[step + 1])", "0.0)"),
            ("recipe.weighted(loss)", "sum(loss)"),
        ],
    ),
    (
        "lab/training/causal_ode.py",
        SECOND,
        [
            ("euler(a, b, now, then)", "euler(a, b, then, now)"),
            ("(index == step)", "(index == step + 1)"),
            ("chosen(slopes), layout)", "chosen(states), layout)"),
            ("told, start - following)", "told)"),
            ("velocity(system.transformer, end,", "velocity(system.transformer, noise,"),
        ],
    ),
    (
        "lab/training/optimiser.py",
        AVERAGE,
        [
            ("1 - self.decay)", "self.decay)"),
        ],
    ),
    (
        "lab/training/optimiser.py",
        ADAMW,
        [
            ("(CLIP / (norm + 1e-6)).clamp(max=1.0)", "(CLIP / (norm + 1e-6))"),
            ("betas=(0.9, 0.98)", "betas=(0.9, 0.999)"),
            ("self.base_rate * rate", "self.base_rate"),
        ],
    ),
    (
        "lab/training/train.py",
        RATE,
        [
            ("0.5 * (1 + cos(pi", "0.5 * (1 - cos(pi"),
            ("(step + 1) / warmup", "step / warmup"),
        ],
    ),
    (
        "lab/training/stages.py",
        METHOD,
        [
            (
                "number % recipe.matching_every == 0\n        matching",
                "number % recipe.matching_every == 1\n        matching",
            ),
            (
                "self.weights.write_average(self.teacher)\n        if due",
                "pass\n        if due",
            ),
            ("(recipe.shortcut * loss).backward()", "loss.backward()"),
            ("for _ in range(recipe.fake_updates)", "for _ in range(1)"),
        ],
    ),
    (
        "networks/timestep.py",
        TIMES,
        [
            ("angles.cos(), angles.sin()", "angles.sin(), angles.cos()"),
            ("-math.log(10000.0)", "math.log(10000.0)"),
            ("device=t.device) / half", "device=t.device) / (half - 1)"),
        ],
    ),
    (
        "networks/timestep.py",
        f"{HISTORY_PASS} {STREAM}",
        [
            ("step = step * scale", "step = step * 1.0"),
            ("own, sigma * scale, step, rows", "own, sigma, step, rows"),
            ("own, sigma * scale, step, rows", "own, sigma * scale, None, rows"),
            ("cross, sigma * scale, step, 4", "cross, sigma * gate_scale, step, 4"),
            ("gate, sigma * gate_scale, step, 1", "gate, sigma * scale, step, 1"),
            ("model.av_ca_a2v_gate_adaln_single,", "model.av_ca_video_scale_shift_adaln_single,"),
            (
                "adapted(module.linear, F.silu(embedded), few_step)",
                "adapted(module.linear, embedded, few_step)",
            ),
        ],
    ),
    (
        "networks/timestep.py",
        WHOLE_PASS,
        [
            ("config.av_ca_timestep_scale_multiplier / 1000.0", "1.0 / 1000.0"),
        ],
    ),
    (
        "networks/modulation.py",
        WHOLE_PASS,
        [
            (
                "shift, scale, gate, ff_shift, ff_scale, ff_gate = rows",
                "scale, shift, gate, ff_shift, ff_scale, ff_gate = rows",
            ),
            (
                "shift, scale, gate, ff_shift, ff_scale, ff_gate = rows",
                "shift, scale, ff_gate, ff_shift, ff_scale, gate = rows",
            ),
            (
                "a2v_scale, a2v_shift, v2a_scale, v2a_shift = _spread",
                "a2v_shift, a2v_scale, v2a_shift, v2a_scale = _spread",
            ),
            (
                "(to_video, to_audio) if is_video else (to_audio, to_video)",
                "(to_audio, to_video) if is_video else (to_video, to_audio)",
            ),
            (
                "shift, scale = _spread(table, embedding.head",
                "scale, shift = _spread(table, embedding.head",
            ),
            ("1 + scale, shift, gate, 1 +", "scale, shift, gate, 1 +"),
            ("gate, 1 + ff_scale", "gate, ff_scale"),
            ("(1 + v2a_scale, v2a_shift)", "(v2a_scale, v2a_shift)"),
            (
                "video_cross, prompts[0], video, self.video_groups, True)",
                "audio_cross, prompts[0], video, self.video_groups, True)",
            ),
        ],
    ),
    (
        "networks/rope.py",
        TURN,
        [
            ("first * cos - second * sin", "first * cos + second * sin"),
            ("second * cos + first * sin", "second * cos - first * sin"),
        ],
    ),
    (
        "networks/rope.py",
        PLACES,
        [
            ("(begin + end) / 2 if", "begin if"),
            ("(stride * index - (stride - 1)).clamp(min=0)", "stride * index"),
            ("2 * fractions - 1", "fractions"),
            ("theta, torch.linspace(0.0, 1.0, count,", "theta, -torch.linspace(0.0, 1.0, count,"),
            ("x n k -> n (k x)", "x n k -> n (x k)"),
            ("(pad, 0), value=left_over", "(0, pad), value=left_over"),
            ('"w k -> (f h w) k"', '"w k -> (f w h) k"'),
            ("* config.audio_hop_length /", "* 2 * config.audio_hop_length /"),
            ("F.pad(table.sin, (0, 0, sinks, 0))", "F.pad(table.sin, (0, 0, sinks, 0), value=1.0)"),
        ],
    ),
    (
        "networks/rope.py",
        f"{NETWORK}::test_interleaved_rows_are_reordered_within_each_head",
        [
            ('"(a r two) ... -> (a two r) ..."', '"(a r two) ... -> (two a r) ..."'),
        ],
    ),
    (
        "networks/attention.py",
        WHOLE_PASS,
        [
            (
                "norm_heads(x, norm.weight, norm.eps, heads, table)",
                "rotate(split_heads(x, heads), table)",
            ),
            ("q, heads, kernels, query_rope)", "q, heads, kernels)"),
        ],
    ),
    (
        "networks/layer.py",
        WHOLE_PASS,
        [
            ("return rotate(k, rope), v", "return k, v"),
            (
                "kernels.add_norm(x, mod.attn_gate, own, eps)\n    else:",
                "kernels.add_norm(x, mod.ff_gate, own, eps)\n    else:",
            ),
            ("torch.addcmul(x, mod.ff_gate, out)", "torch.addcmul(x, mod.attn_gate, out)"),
            ("meeting.x, mod.cross_gate, other", "meeting.x, mod.attn_gate, other"),
            (
                "cross = mod.query_scale, mod.query_shift, mod.key_scale",
                "cross = mod.key_scale, mod.query_shift, mod.query_scale",
            ),
            (
                "audio = _after_meeting(model, hearing, video_keys",
                "audio = _after_meeting(model, hearing, audio_keys",
            ),
            ("cross_rope=run.tables.cross_video", "cross_rope=run.tables.cross_video.tokens(0, 1)"),
        ],
    ),
    (
        "networks/layer.py",
        "networks/test_known_network.py::test_the_feed_forward_is_a_gated_tanh_gelu",
        [('approximate="tanh"', 'approximate="none"')],
    ),
    (
        "networks/kernels.py",
        WHOLE_PASS,
        [
            ("torch.addcmul(shift, _norm(x, eps), scale)", "torch.addcmul(shift, x, scale)"),
            (
                "torch.addcmul(other_shift, normed, other_scale)",
                "torch.addcmul(other_shift, x, other_scale)",
            ),
            ("x = x + out if", "x = x - out if"),
        ],
    ),
    (
        "networks/kernels.py",
        STREAM,
        [
            (".sub_(second * sin)", ".add_(second * sin)"),
            ("other.copy_(second)", "other.copy_(first)"),
        ],
    ),
    (
        "networks/transformer.py",
        WHOLE_PASS,
        [
            (
                "F.layer_norm(x, (x.shape[-1],), eps=1e-6)",
                "F.rms_norm(x, (x.shape[-1],), eps=1e-6)",
            ),
            (
                'F.gelu(module.linear_1(context), approximate="tanh")',
                "F.silu(module.linear_1(context))",
            ),
            ("torch.cat((sinks, tokens), dim=1)", "torch.cat((tokens, sinks), dim=1)"),
        ],
    ),
    (
        "networks/full_sequence.py",
        f"{MASKS} {WHOLE_PASS}",
        [
            (
                "key_block[None, :] <= query_block[:, None]",
                "key_block[None, :] < query_block[:, None]",
            ),
            (
                "key_block[None, :] <= query_block[:, None]",
                "key_block[None, :] >= query_block[:, None]",
            ),
            (
                "key_block[None, :] <= query_block[:, None]",
                "key_block[None, :] <= query_block[:, None] + 1",
            ),
            ("audio_to_video=mask(video_sizes, audio_sizes)", "audio_to_video=None"),
            ("(audio_places - sinks).clamp(min=0)", "audio_places.clamp(max=audio.shape[1] - 1)"),
        ],
    ),
    (
        "networks/full_sequence.py",
        HISTORY_PASS,
        [
            (
                "past = sum(key_sizes[:block])",
                "past = sum(key_sizes[: block + 1]) % (key_clean + 1)",
            ),
            ("past = sum(key_sizes[:block])", "past = sum(key_sizes[: max(0, block - 1)])"),
            (
                "torch.cat((torch.zeros_like(noisy[:, :1]), noisy), dim=1)",
                "torch.cat((noisy[:, :1], noisy), dim=1)",
            ),
            (
                "torch.arange(sum(lengths)).repeat(copies)",
                "torch.arange(sum(lengths)).repeat_interleave(copies)",
            ),
            ("torch.arange(1, 1 + copies * blocks)", "torch.arange(copies * blocks, 0, -1)"),
        ],
    ),
    (
        "networks/key_stores.py",
        STREAM,
        [
            (
                "self.kernels.rotate(k, rope), v\n        parts.append",
                "k, v\n        parts.append",
            ),
            (
                "*read(part, k), table.tokens(start, stop)",
                "*read(part, k), table.tokens(0, stop - start)",
            ),
            ("parts.append((k, v))\n", "parts.insert(0, (k, v))\n"),
            ("self.second.extend(name, next_k, next_v", "self.second.extend(name, next_k, v"),
        ],
    ),
    (
        "networks/kv_cache.py",
        STREAM,
        [
            ("first = max(1, end - window) if", "first = max(1, end - 1 - window) if"),
            ("(*range(min(end, 1)), *range(first, end))", "(*range(first, end),)"),
            (
                "n * height * width for n in layout.video_span(kept)",
                "n * height * width for n in layout.video_span(cache.next_block)",
            ),
            ('"audio_to_video": whole.cross_audio', '"audio_to_video": whole.cross_video'),
            ("start if self.is_prefix else start + sinks, stop + sinks", "start, stop + sinks"),
            ("audio_tokens[:, sinks:]", "audio_tokens[:, : audio_tokens.shape[1] - sinks]"),
        ],
    ),
    (
        "networks/layout.py",
        LAYOUT,
        [
            ("start = first + (block - 1) * following", "start = first + block * following"),
            ("AUDIO_PER_BLOCK = 25", "AUDIO_PER_BLOCK = 24"),
            ("return count + 1", "return count"),
        ],
    ),
    (
        "networks/vocoder.py",
        CODECS,
        [
            ("(i * (i + 1) / (2 * hop))", "(i * i / hop)"),
            ("log_amplitude.exp() * (frequency < nyquist)", "log_amplitude.exp()"),
            ("gain = noise.exp()", "gain = noise"),
            (
                "2595.0 * torch.log10(1.0 + frequency / 700.0)",
                "2595.0 * torch.log10(1.0 + frequency / 500.0)",
            ),
            ("700.0 * (10.0 ** (mel / 2595.0) - 1.0)", "700.0 * (10.0 ** (mel / 2595.0))"),
        ],
    ),
    (
        "networks/audio_codec.py",
        f"{CODECS} networks/test_audio_codec.py",
        [
            (
                "(mean - self.latent_mean) / self.latent_std",
                "(mean - self.latent_mean) * self.latent_std",
            ),
            ("torch.cos(2 * math.pi * turns)", "torch.sin(2 * math.pi * turns)"),
            ("self.window).abs() * (4 / size)", "self.window).abs() * (2 / size)"),
        ],
    ),
    (
        "networks/video_codec.py",
        CODECS,
        [
            (
                "(mean - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)",
                "(mean + _per_channel(self.latent_mean)) / _per_channel(self.latent_std)",
            ),
            (
                "raw = latent * _per_channel(self.latent_std) + _per_channel(self.latent_mean)",
                "raw = latent * _per_channel(self.latent_std)",
            ),
            ('"b c f (h y) (w x) -> b (c y x) f h w"', '"b c f (h y) (w x) -> b (c x y) f h w"'),
        ],
    ),
    (
        "networks/causal_conv.py",
        CODECS,
        [
            ("[x[:, :-2], x[:, 1:-1], x[:, 2:]]", "[x[:, 2:], x[:, 1:-1], x[:, :-2]]"),
            ("[x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]]", "[x[:, 1:-1:2], x[:, :-2:2], x[:, 2::2]]"),
            ("return x[:, 1:] if stream.starts else x", "return x[:, :-1] if stream.starts else x"),
        ],
    ),
    (
        "lab/training/audio_losses.py",
        CODEC_LOSSES,
        [
            ("power.sqrt() * (4 / size)", "power.sqrt() * (2 / size)"),
            ("0.25 * logarithmic + linear", "logarithmic + 0.25 * linear"),
            ("octaves = (log_f0 - target).abs() / 0.6931", "octaves = (log_f0 - target).abs()"),
            ("weight = weight * (true > 0)", "weight = weight * 1"),
            ("(2 * log_std).exp() - 1 - 2 * log_std", "log_std.exp() - 1 - log_std"),
            ("- 1 - 2 * log_std", "- 1 + 2 * log_std"),
            ("hop: int = 80", "hop: int = 160"),
            ("(bands, -1)).mean(2)", "(-1, bands)).mean(1)"),
        ],
    ),
    (
        "lab/training/video_codec.py",
        CODEC_LOSSES,
        [
            ("1.0 + 3.0 * moves.float() + 4.0 * now", "1.0 + 3.0 * now"),
            ("error.abs() + 0.5 * error.square()", "error.abs() + error.square()"),
            (
                "error.narrow(axis, 1, length) - error.narrow(axis, 0, length)",
                "error.narrow(axis, 1, length) + error.narrow(axis, 0, length)",
            ),
        ],
    ),
    (
        "samplers/start.py",
        GIVEN,
        [
            ("torch.arange(count) >= given", "torch.arange(count) > given"),
            ("self.layout.audio_latents(self.first)", "self.layout.video_latents(self.first)"),
            ("int((free == 0).sum())", "int((free != 0).sum())"),
        ],
    ),
    (
        "samplers/decode.py",
        DECODED,
        [
            ("((pictures + 1) / 2).clamp(0, 1)", "((pictures + 1) / 2).clamp(0, 2)"),
            (
                "context[::-1]",
                "context",
                "one block has all the latents that the decoder looks back on: there is no order",
            ),
            ("state.block(block - 1 - len(context))", "state.block(block - len(context))"),
        ],
    ),
    (
        "samplers/overlap.py",
        PIECES,
        [
            ("max(0, settled - overlap)", "max(0, settled - overlap + 1)"),
            ("_frames(clock, piece.first + 1) - 1", "_frames(clock, piece.first)"),
            ("min(end, settles + overlap)", "min(end, settles)"),
        ],
    ),
    (
        "lab/training/adapters.py",
        f"{WEIGHTS}::test_an_adapter_adds_its_share_of_two_products",
        [
            ("settings.alpha / settings.rank", "settings.alpha"),
            ("self.scale * (self.up.float()", "(self.up.float()"),
            ("torch.zeros(base.out_features", "torch.ones(base.out_features"),
        ],
    ),
    (
        "networks/text_encoder.py",
        SHIPPED,
        [
            ("self.word(ids) + self.place", "self.word(ids) - self.place"),
            ("F.gelu(self.expand(", "F.relu(self.expand("),
            (
                "F.scaled_dot_product_attention(q, k, v)",
                "F.scaled_dot_product_attention(q, k, v, scale=1.0)",
            ),
        ],
    ),
    (
        "networks/audio_codec.py",
        SHIPPED,
        [
            ("_AMPLITUDE_SLOPE = 2.3", "_AMPLITUDE_SLOPE = 2.0"),
            (
                "torch.softmax(logits, dim=-1) @ self.f0_grid.float()",
                "self.f0_grid.float()[logits.argmax(-1)]",
            ),
            ("x = x[..., LATENT_FRAMES - 1 :]", "x = x[..., : 1 - LATENT_FRAMES]"),
        ],
    ),
    (
        "networks/rope.py",
        SHIPPED,
        [
            ("/ config.fps", "/ (config.fps + 1)"),
        ],
    ),
    (
        "networks/timestep.py",
        FEW_STEP,
        [
            ("(step > 0) * gate_of(guidance)", "(step >= 0) * gate_of(guidance)"),
        ],
    ),
    (
        "networks/few_step.py",
        FEW_STEP,
        [
            ("y + factor * adapter", "y - factor * adapter"),
            ("y + factor * adapter", "factor * (y + adapter.up(adapter.down(x))) + 0 * adapter"),
            ("return (guidance - 1) / 2", "return guidance - 1"),
            ("return (guidance - 1) / 2", "return guidance / 2"),
        ],
    ),
    (
        "networks/picture_track.py",
        SIGHT,
        [
            ("1 - before, 1 - after", "1 - after, 1 - before"),
            ("+ 0.5) * (2 / n) - 1", ") * (2 / n) - 1"),
            ('meshgrid(down, across, indexing="ij")', 'meshgrid(across, down, indexing="xy")'),
            (".mean(dim=(2, 3))", ".amax(dim=(2, 3))"),
            ("(self.frames, self.channels)).flatten", "(self.channels, self.frames)).flatten"),
            ("return F.gelu(at", "return (at"),
        ],
    ),
    (
        "networks/timestep.py",
        f"{SIGHTS}::test_a_layer_has_two_adapters_and_each_its_own_factor",
        [
            ("(few_step, pictures), dim=-1", "(pictures, few_step), dim=-1"),
            ("ones * shown[:, None]", "ones"),
        ],
    ),
    (
        "samplers/rollout.py",
        TOLD_SIGHT,
        [
            ("                seen is not None,", "                kept is not None,"),
            ("shown, min(state.next_block, 1)", "shown, 0"),
            (
                "picture_track(video, latents, before, after)",
                "picture_track(video, latents, after, before)",
            ),
        ],
    ),
    (
        "samplers/start.py",
        TOLD_SIGHT,
        [("after = int(end < self.video.shape[2])", "after = 0")],
    ),
    (
        "lab/training/pictures.py",
        LEARNED_SIGHT,
        [
            ("draws.integers(2 * NEAR + 1) - NEAR", "draws.integers(2 * NEAR + 1)"),
            ("torch.where(kind < ends[0]", "torch.where(kind > ends[0]"),
            ("shifted, shifted, audio.roll(1, 0), begun", "shifted, audio, audio, begun"),
            ("Pair(torch.zeros_like(audio), audio)", "Pair(audio, audio)"),
            ("caption_dropout, draws, 1.0)", "caption_dropout, draws, 0.0)"),
        ],
    ),
    (
        "samplers/stream_memory.py",
        f"{MEMORY}::test_memory_and_colours_are_taomates_after_every_block",
        [
            ("COLOUR_RATE = 0.15, 0.10, 0.03", "COLOUR_RATE = 0.10, 0.10, 0.03"),
            ("(1 - rate) * old + rate * fresh", "rate * old + (1 - rate) * fresh"),
            ("self.anchor.mean, self.spread)", "self.anchor.mean, self.anchor.std)"),
            ("blended + PATCH * lacking", "blended - PATCH * lacking"),
        ],
    ),
    (
        "samplers/rollout.py",
        f"{MEMORY}::test_a_new_prompt_reads_the_past_again_but_for_the_pictures_own_keys",
        [("new._replace(video=held[i].video)", "new")],
    ),
    (
        "networks/modulation.py",
        LATER_PASS,
        [
            (
                "text_shift, text_scale, text_gate = rows",
                "text_scale, text_shift, text_gate = rows",
            ),
            ("prompt_shift, prompt_scale = _spread", "prompt_scale, prompt_shift = _spread"),
        ],
    ),
    (
        "networks/kernels.py",
        LATER_PASS,
        [('(2 * rearrange(logits, "b n a -> b a n 1").sigmoid())', "2")],
    ),
    (
        "networks/memory_branch.py",
        LATER_PASS,
        [
            ("scale, shift = rows.chunk", "shift, scale = rows.chunk"),
            ("kernels.modulate(x, scale, shift, eps)", "shift + x * scale"),
        ],
    ),
    (
        "networks/memory_branch.py",
        "lab/test_memory.py::test_a_whole_sequence_is_told_what_blocks_are_told_one_by_one",
        [
            ("// memory.shape[1] + 1", "// memory.shape[1]"),
            ("found * (block > 0)[:, None]", "found"),
            ("(0, 0, 1, 0)", "(0, 0, 0, 1)"),
        ],
    ),
    (
        "lab/training/history.py",
        "lab/test_memory.py::test_a_history_is_made_under_the_memory_that_the_sampler_has",
        [
            ("memories[-1 - later : -1]", "memories[-later:]"),
            ("keys, level, track, past)", "keys, level, track)"),
        ],
    ),
    (
        "networks/few_step.py",
        ADAPTERS,
        [
            ("alpha=gate_of(guidance)", "alpha=guidance"),
            ('adapter = other._modules.pop("few_step", None)', "adapter = None"),
            ("adapter.down.weight.t(), adapter.up", "-adapter.down.weight.t(), adapter.up"),
            ("not parts or not all(_is_plain", "not all(_is_plain"),
            ("> FOLDED_BYTES", "< 0"),
            ("not patched\n        and type", "type"),
            ("and weight.dtype == like.dtype", "or weight.dtype == like.dtype"),
            ("if weight.dtype == torch.float32", "if weight.dtype != torch.float32"),
        ],
    ),
    (
        "networks/tape.py",
        TAPE,
        [
            ("tuple(x.clone() for x in self.outputs)", "self.outputs"),
            (
                "            own.copy_(given)\n        for step",
                "            pass\n        for step",
            ),
            ("dtype.itemsize + value.storage_offset()", "dtype.itemsize"),
            ("in (*given, *made):\n                last", "in made:\n                last"),
            ("len(calls) for tensor in kept", "0 for tensor in kept"),
            ("size = -(-tensor.untyped", "size = (tensor.untyped"),
            ("elif given and id(given[0]) in self._root:", "elif not index:"),
            ("leaving.pop(index, ())", "leaving.pop(index + 1, ())"),
            ("if free[size]:", "if False:"),
            ("if given == wanted and [", "if ["),
        ],
    ),
    (
        "networks/tensor_parallel.py",
        RANKS,
        [
            ("whole[rank] - exact[rank]", "exact[rank] - whole[rank]"),
            ("sum(counts[:rank])", "sum(counts[rank + 1 :])"),
            ("and self.rank and _is_added_once", "and _is_added_once"),
            ('found["leaf"] == "bias" and found["layer"] in _COLUMNS', "False"),
            (
                '".down.weight" if rows else ".up.weight"',
                '".up.weight" if rows else ".down.weight"',
            ),
            ("(?:few_step|pictures)", "(?:few_step)"),
            ("squares / (heads * dim)", "squares / made.shape[-1]"),
            ("* factor * asked.norm.weight.float()", "* factor"),
            (
                'kinds = "video", "audio", "crossing", "crossing"',
                'kinds = "video", "audio", "video", "audio"',
            ),
            (".square().sum(-1", ".square().mean(-1"),
            (
                "return x[:, :, self.held(name)].clone()",
                "return x[:, :, : self.count(name)].clone()",
            ),
            ('"audio_to_video_attn": "crossing"', '"audio_to_video_attn": "audio"'),
            (
                "message.split([tensor.numel() for tensor in tensors])",
                "message.split([tensor.numel() for tensor in tensors[::-1]])",
            ),
            ("return made if asked.table is None else rotate(made, asked.table)", "return made"),
        ],
    ),
    ("networks/layer.py", RANKS, [("own = yield from whole_sum(part, own)", "own = own")]),
    ("networks/kv_cache.py", RANKS, [("whole = part.tables(whole)", "pass")]),
    (
        "model_loaders/eight_bits.py",
        "model_loaders/test_eight_bits.py",
        [
            ("min(tried, key", "max(tried, key"),
            ("{} if products else {_MULTIPLIED_OUT: True}", "{_MULTIPLIED_OUT: True}"),
        ],
    ),
    ("lab/training/video_codec.py", DRAWN, [("torch.exp(0.5 * logvar)", "torch.exp(logvar)")]),
    (
        "lab/training/audio_codec.py",
        DRAWN,
        [
            ("mean + log_std.exp() * torch.randn", "mean + torch.randn"),
        ],
    ),
]
"""File, tests, and (what stands there, by what it is replaced[, why no test sees it])."""

MUTANTS = [
    Mutant(file, *change[:2], tests, *change[2:])
    for file, tests, changes in WRONG
    for change in changes
]
