"""DAPO: equal to GRPO where it must be, overlong answers, dynamic sampling through the collecting loop."""

import io
import math
import random
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
import torch
from loss_batches import gradient, make_batch, make_group, make_output, make_trajectory

from mcore_rl.algorithms import load
from mcore_rl.data.real_fake import DiscriminatorState, Fake
from mcore_rl.data.sequences import sequences_of
from mcore_rl.functional.reward import overlong_penalty
from mcore_rl.model.checkpoint import Progress, read_progress, write_progress
from mcore_rl.rollout.collect import collect, score
from mcore_rl.types import BatchAhead, Prompt, RolloutGroup, SamplingParams
from tools.bench.batches import pack_mini_batch


def test_equal_clips_and_sequence_mean_make_it_grpo():
    dapo = load("dapo", clip_high=0.2, aggregation="sequence_mean", dynamic_sampling=False)
    batch, out = (b := make_batch()), make_output(b)
    with torch.no_grad():
        out.logprobs[1] = batch.old_logprobs[1] + math.log(1.25)  # between the two upper clips
    assert torch.equal(gradient(dapo, batch, out), gradient(load("grpo"), batch, out))
    assert dapo.loss(batch, out).loss == load("grpo").loss(batch, out).loss
    assert not torch.equal(gradient(load("dapo"), batch, out), gradient(load("grpo"), batch, out))


def test_loss_and_gradient_by_an_independent_formula():
    """Eq. 8 over the tokens of the batch, written with loops."""
    batch = make_batch(aggregation="token_mean")
    out = make_output(batch, scale=0.5)
    total, count = 0.0, 0
    for lp, old, a, m in zip(out.logprobs, batch.old_logprobs, batch.advantages, batch.loss_mask):
        if m:
            r = torch.exp(lp - old)
            total = total + min(r * a, torch.clamp(r, 0.8, 1.28) * a)
            count += 1
    loss = -total / count
    assert load("dapo").loss(batch, out).loss.item() == pytest.approx(loss.item(), rel=1e-13)
    (expected,) = torch.autograd.grad(loss, out.logprobs)
    torch.testing.assert_close(gradient(load("dapo"), batch, out), expected, rtol=1e-12, atol=0)


def test_token_mean_within_a_group():
    """Eq. 8: every group is normalised by its own tokens. With one group that is the token mean of the batch."""

    def weights(algorithm, groups):
        samples = sequences_of(groups, algorithm)
        (batch,) = pack_mini_batch(samples, algorithm, rank=0, num_ranks=1, budget=99, max_response=9)
        sums = torch.zeros(len(samples)).index_add(0, batch.segment_ids, batch.weights)
        longest_first = np.argsort(-samples.columns.lengths, kind="stable")
        n = torch.from_numpy(samples.columns.num_response[longest_first])
        return dict(zip(n.tolist(), (sums / n).tolist()))  # a token's weight, by the response's length

    def group(name, *lengths):
        answers = (make_trajectory(float(i % 2), length=n) for i, n in enumerate(lengths))
        return RolloutGroup(Prompt(name, (1, 2), ""), tuple(answers))

    eq_8, usual = load("dapo", aggregation="group_token_mean"), load("dapo")
    short, long = group("0", 1, 2), group("1", 3, 7)
    got = weights(eq_8, [short, long])
    assert got == pytest.approx({1: 1 / 6, 2: 1 / 6, 3: 1 / 20, 7: 1 / 20}, rel=1e-6)
    assert weights(usual, [short, long]) == pytest.approx(dict.fromkeys((1, 2, 3, 7), 1 / 13), rel=1e-6)
    assert weights(eq_8, [long]) == pytest.approx(weights(usual, [long]), rel=1e-6)


class TestOverlong:
    @pytest.mark.parametrize(
        ("length", "expected"),
        [(1, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1), (24576, -1)],
    )
    def test_soft_punishment_has_a_floor(self, length, expected):
        assert overlong_penalty(length, max_length=20480, cache=4096) == pytest.approx(expected, rel=1e-12)

    def test_shaped_reward(self):
        algorithm = load("dapo", overlong_max_length=8, overlong_cache=4)
        assert algorithm.reward(make_trajectory(1.0, length=5)) == 0.75
        assert load("dapo").reward(make_trajectory(1.0, length=500)) == 1.0

    def test_truncated_answers_have_no_loss_but_count_in_their_group(self):
        algorithm = load("dapo", overlong_filter=True, advantage_eps=0.0)
        group = make_group(1.0, 0.0, 0.0)
        cut_off = replace(group.trajectories[2], finish_reason="length")
        group = replace(group, trajectories=(*group.trajectories[:2], cut_off))
        samples = sequences_of([group], algorithm)
        assert samples.columns.num_loss.tolist() == [2, 2, 0]
        assert samples.columns.advantages.tolist() == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
        (batch,) = pack_mini_batch(samples, algorithm, rank=0, num_ranks=1, budget=100, max_response=8)
        assert batch.loss_mask.sum().item() == 4 and batch.weights[batch.loss_mask].tolist() == [0.25] * 4
        assert sequences_of([group], load("dapo")).columns.num_loss.tolist() == [2, 2, 2]


class TestKeep:
    @pytest.mark.parametrize(
        ("rewards", "kept"), [((1, 1, 1), False), ((0, 0), False), ((1, 0, 1), True), ((1,), False)]
    )
    def test_groups_that_teach(self, rewards, kept):
        assert load("dapo").keep(make_group(*map(float, rewards))) is kept
        assert load("dapo", dynamic_sampling=False).keep(make_group(*map(float, rewards)))

    def test_equal_rewards_are_equal_however_they_were_added(self):
        assert not load("dapo").keep(make_group(*[0.1 + 0.2] * 7))


@dataclass
class FakeEngine:
    """Two answers a prompt; `policy_version` as any engine has it."""

    policy_version: int = 7
    calls: list = field(default_factory=list)

    def generate(self, prompts, params, seed):
        self.calls.append(([p.id for p in prompts], seed))
        lengths = range(1, params.n + 1)
        return [
            RolloutGroup(
                p,
                tuple(replace(make_trajectory(length=k), versions=np.full(k, self.policy_version)) for k in lengths),
            )
            for p in prompts
        ]


class FakeTask:
    def train_prompt(self, index):
        return Prompt(str(index), (1, 2), str(index), answer=object())


def fake_reward(prompt, trajectory):
    """Seeded by the prompt: some prompts tell the answers apart, some do not."""
    spread = random.Random(int(prompt.id)).random() < 0.4
    return float(len(trajectory.response_ids) == 1) if spread else 1.0


def informative(index):
    return random.Random(index).random() < 0.4


def run_collect(engine, num_prompts=6, cursor=100, **options):
    params = SamplingParams(n=2)
    algorithm = options.pop("algorithm", load("dapo"))

    def rollout(first, seed):
        prompts = [FakeTask().train_prompt(first + i) for i in range(num_prompts)]
        return [score(group, fake_reward) for group in engine.generate(prompts, params, seed)]

    return collect(rollout, algorithm, lambda ask: ask(), cursor=cursor, num_prompts=num_prompts, seed=5, **options)


def routed(trajectory):
    return replace(trajectory, expert_ids=np.arange(2 * (trajectory.num_tokens - 1), dtype=np.uint8).reshape(-1, 1, 2))


def ids(groups):
    return [int(g.prompt.id) for g in groups]


class TestDynamicSampling:
    def test_refills_until_full_and_no_further(self):
        engine = FakeEngine()
        got = run_collect(engine)
        rounds = 0
        wanted: list[int] = []
        while len(wanted) < 6:
            wanted += [i for i in range(100 + 6 * rounds, 106 + 6 * rounds) if informative(i)]
            rounds += 1
        assert 1 < rounds == len(engine.calls) == got.generations and len(got.sampled) == 6 * rounds
        assert ids(got.groups) == wanted[:6] and ids(got.carried) == wanted[6:] and got.num_kept == len(wanted)

    def test_nothing_twice_and_one_policy_version(self):
        engine = FakeEngine()
        got = run_collect(engine)
        asked = [i for ids, _ in engine.calls for i in ids]
        assert len(asked) == len(set(asked)) == len(got.sampled)
        assert len({seed for _, seed in engine.calls}) == len(engine.calls)
        assert len(set(ids(got.groups) + ids(got.carried))) == got.num_kept
        assert {t.policy_version for g in got.groups for t in g.trajectories} == {7}

    def test_surplus_begins_the_next_batch_and_says_how_old_it_is(self):
        """Over many steps every informative prompt is trained on once, in order, and none is older than one version."""
        cursor, carried, trained, generations = 0, (), [], 0
        for version in range(12):
            engine = FakeEngine(policy_version=version)
            got = run_collect(engine, cursor=cursor, carried=carried)
            versions = [{t.policy_version for t in g.trajectories} for g in got.groups]
            stale = len(carried)
            assert versions == [{version - 1}] * stale + [{version}] * (6 - stale)
            assert len(got.carried) < 6 and ids(got.groups)[:stale] == ids(carried)
            cursor, carried, trained = cursor + len(got.sampled), got.carried, trained + ids(got.groups)
            generations += got.generations
        assert trained + ids(carried) == [i for i in range(cursor) if informative(i)]
        # without the buffer 12 batches need the rounds that each of them needs alone
        dropping, alone, cursor = load("dapo", carry_surplus=False), 0, 0
        for _ in range(12):
            got = run_collect(FakeEngine(), cursor=cursor, algorithm=dropping)
            assert got.carried == ()
            alone, cursor = alone + got.generations, cursor + len(got.sampled)
        assert generations < alone

    def test_a_checkpoint_holds_the_surplus(self, tmp_path):
        """Answers and metadata may be anything, so they are not in it; what training needs comes back as it was."""
        carried = run_collect(FakeEngine()).carried
        carried = tuple(replace(g, trajectories=tuple(map(routed, g.trajectories))) for g in carried)
        assert carried[0].prompt.answer is None and carried[0].prompt.token_ids == (1, 2)
        ahead = (BatchAhead(4, 8, carried[:1]), BatchAhead(5, 16))
        state = DiscriminatorState(fresh=(Fake(3, (7, 1)),), buffer=(Fake(1, (5,)), Fake(2, ())))
        before = Progress(3, 40, 3, 0.1, carried, state, ahead)
        buffer = io.BytesIO()
        torch.save(asdict(before.without_rollouts()), buffer)
        write_progress(tmp_path / "rollouts.safetensors", before)
        buffer.seek(0)
        plain = Progress.of(torch.load(buffer))  # weights_only, as Megatron loads what is not sharded
        assert plain.carried == () and plain == before.without_rollouts()
        assert read_progress(tmp_path / "rollouts.safetensors", plain) == before

    def test_a_checkpoint_without_the_file_of_rollouts(self, tmp_path):
        """As earlier versions wrote it: it can be continued where nothing waits, else it is refused."""
        path = tmp_path / "rollouts.safetensors"
        assert read_progress(path, Progress(3, 40, 3)) == Progress(3, 40, 3)
        waiting = Progress.of(asdict(Progress(3, 40, 3, carried=run_collect(FakeEngine()).carried)))
        with pytest.raises(ValueError, match="was written by an earlier version"):
            read_progress(path, waiting)

    def test_kept_groups_have_the_gradient_they_have_without_sampling(self):
        """Only the denominator changes: advantages of a kept group are its own."""
        got = run_collect(FakeEngine())
        for group in got.groups:
            assert load("dapo").advantages(group).tolist() == load("grpo").advantages(group).tolist()

    def test_limit_raises(self):
        engine = FakeEngine()
        with pytest.raises(ValueError, match="2 generations of 6 prompts kept only"):
            run_collect(engine, max_rounds=2)
        assert len(engine.calls) == 2

    def test_without_it_one_generation_is_enough(self):
        engine = FakeEngine()
        got = run_collect(engine, algorithm=load("dapo", dynamic_sampling=False))
        assert len(engine.calls) == 1 and len(got.groups) == len(got.sampled) == 6 and got.carried == ()

    def test_filter_sees_raw_rewards(self):
        """Length shaping would tell equal answers apart; the filter comes before it."""
        algorithm = load("dapo", overlong_max_length=2, overlong_cache=1)
        got = run_collect(FakeEngine(), algorithm=algorithm)
        assert all(informative(int(g.prompt.id)) for g in got.groups)
        assert [t.reward for t in got.groups[0].trajectories] == [1.0, -1.0]
        assert {t.reward for g in got.sampled for t in g.trajectories} == {0.0, 1.0}
