"""The front end against transformers' own, and the facts of patches and augmentation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import Phi4MultimodalFeatureExtractor

from melprobe.audio.augment import add_noise, change_speed, spec_augment, warp_frequency
from melprobe.audio.mel import MelSettings, frame_count, log_mel, normalise
from melprobe.audio.patches import FRAMES_PER_PATCH, patch_at, patch_count, patch_rate, patch_span
from tests.tiny import waves


def test_log_mel_equals_phi4_multimodals():
    clips = [*waves(1.7, 1.7, 1.7), np.zeros(27_200, np.float32)]
    extractor = Phi4MultimodalFeatureExtractor()
    theirs = extractor(clips, sampling_rate=16_000, return_tensors="pt")["audio_input_features"]
    ours = log_mel(torch.from_numpy(np.stack(clips)))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-3


def test_a_batch_in_pieces_equals_each_clip_alone():
    clips = torch.from_numpy(np.stack(waves(*[1.0] * 25)))
    alone = torch.cat([log_mel(clip[None]) for clip in clips])
    assert torch.allclose(log_mel(clips), alone, atol=1e-5)


def test_log_mel_has_a_gradient():
    clip = torch.from_numpy(waves(0.3)[0])[None].requires_grad_()
    log_mel(clip).sum().backward()
    assert clip.grad.abs().sum() > 0 and clip.grad.isfinite().all()


def test_a_lower_edge_hears_nothing_above_it():
    seconds = np.arange(16_000) / 16_000
    high = torch.tensor(0.5 * np.sin(2 * np.pi * 7000 * seconds), dtype=torch.float32)[None]
    low = torch.tensor(0.5 * np.sin(2 * np.pi * 1000 * seconds), dtype=torch.float32)[None]
    narrow = MelSettings(f_max=5300)
    assert log_mel(low, narrow).max() > log_mel(high, narrow).max() + 8
    assert log_mel(high).max() > log_mel(high, narrow).max() + 8


def test_a_wave_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="shorter than one window, 400"):
        log_mel(torch.zeros(1, 399))


def test_normalisation_ignores_padding_whatever_stands_there():
    mel = torch.randn(2, 50, 80) * 3 + 5
    lengths = torch.tensor([50, 30])
    poisoned = mel.clone()
    poisoned[1, 30:] = torch.nan
    for kind, stats in (
        ("utterance", ()),
        ("none", ()),
        ("global", (mel.mean((0, 1)), mel.std((0, 1)))),
    ):
        found = normalise(poisoned, lengths, kind, *stats)
        assert torch.equal(found, normalise(mel, lengths, kind, *stats))
        assert (found[1, 30:] == 0).all()
    found = normalise(poisoned, lengths, "utterance")[1, :30]
    assert torch.allclose(found.mean(0), torch.zeros(80), atol=1e-5)
    assert torch.allclose(found.std(0, correction=0), torch.ones(80), atol=1e-2)


def test_global_normalisation_without_statistics_is_refused():
    with pytest.raises(ValueError, match="mean and std"):
        normalise(torch.zeros(1, 4, 80), torch.tensor([4]), "global")


@pytest.mark.parametrize(("rate", "frames"), FRAMES_PER_PATCH.items())
def test_patches_tile_the_clip_and_know_their_time(rate, frames):
    assert patch_rate(frames) == rate
    n = patch_count(frame_count(48_000), frames)
    spans = [patch_span(p, frames) for p in range(n)]
    assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(spans))
    assert spans[0][1] - spans[0][0] == pytest.approx(1 / rate)
    assert [patch_at(start, frames) for start, _ in spans] == list(range(n))
    assert [patch_at((a + b) / 2, frames) for a, b in spans] == list(range(n))


def test_speed_changes_length_and_pitch_together():
    tone = np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    fast = change_speed(tone, 1.25)
    assert len(fast) == 12_800
    peak = np.abs(np.fft.rfft(fast)).argmax() * 16_000 / len(fast)
    assert peak == pytest.approx(625, abs=2)


def test_another_vocal_tract_moves_a_tone_as_far_as_singing_it_higher():
    def heard(hertz):
        tone = 0.3 * np.sin(2 * np.pi * hertz * np.arange(8_000) / 16_000)
        return log_mel(torch.tensor(tone, dtype=torch.float32)[None], MelSettings(f_max=5300.0))

    factors = np.array([0.8, 1.0, 1.3])
    warped = warp_frequency(heard(1000.0).expand(3, -1, -1), factors, 5300.0)
    sung = torch.cat([heard(1000.0 * factor) for factor in factors])
    assert torch.equal(warped.argmax(2), sung.argmax(2))
    assert torch.equal(warped[1], heard(1000.0)[0])


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_has_the_power_it_is_asked_to_have(snr):
    clip = waves(1.0)[0]
    noise = add_noise(clip, snr, np.random.default_rng(0)) - clip
    assert 10 * np.log10(np.mean(clip**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.1)


def test_spec_augment_blanks_stripes_and_nothing_else():
    mel = torch.ones(2, 60, 80)
    found = spec_augment(
        mel,
        torch.tensor([60, 20]),
        [np.random.default_rng(seed) for seed in (1, 2)],
        time_masks=1,
        time_mask_frames=30,
        frequency_masks=1,
        frequency_mask_bins=9,
    )
    blank = found == 0
    rows, bins = blank.all(2), blank.all(1)
    assert torch.equal(blank, rows[:, :, None] | bins[:, None, :])
    assert rows.sum(1).tolist()[0] <= 12 and rows.sum(1).tolist()[1] <= 4
    assert (bins.sum(1) <= 9).all()
    assert blank.any()
