"""What the discriminator is shown, what it remembers, and how it is measured."""

import json
import math
import random
from dataclasses import asdict

import pytest
import torch

from mcore_rl.config import DataConfig, DiscriminatorConfig, parse_config
from mcore_rl.data.real_fake import (
    FAKE,
    REAL,
    REJECTED,
    DiscriminatorState,
    Fake,
    check_examples,
    draw_batch,
    held_out,
)
from mcore_rl.data.tasks import build_task
from mcore_rl.functional.discriminator import Normaliser, separation
from mcore_rl.model.checkpoint import Progress, read_progress, write_progress
from tools.make_demo_model import make_tokenizer

FRESH = tuple(Fake(100 + i // 2, (5, 6, i)) for i in range(40))
OLD = tuple(Fake(i, (7, i)) for i in range(20))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def task(tokenizer):
    return build_task(DataConfig(task="digit_constraints"), tokenizer, 0)


def state(**changes):
    return DiscriminatorState(**{"fresh": FRESH, "buffer": OLD, "examples_seen": 7} | changes)


class TestBatch:
    CONFIG = DiscriminatorConfig(batch_size=40, fake_share=0.5, old_share=0.2)

    def test_pairs_and_their_shares(self, task):
        batch, after = draw_batch(task, state(), self.CONFIG, random.Random(0))
        assert [x.kind for x in batch[0::2]] == [REAL] * 20
        assert [x.kind for x in batch[1::2]] == [FAKE] * 10 + [REJECTED] * 10
        fakes = [x.token_ids for x in batch if x.kind == FAKE]
        sequence = {id(f): (*task.real_example(f.example).prompt, *f.response.tolist()) for f in (*FRESH, *OLD)}
        old, fresh = ({*fakes} & {sequence[id(f)] for f in known} for known in (OLD, FRESH))
        assert len(old) == 2 and len(fresh) == 8
        assert after == state(examples_seen=17)

    def test_every_pair_is_about_one_prompt_or_one_answer(self, task):
        batch, _ = draw_batch(task, state(), self.CONFIG, random.Random(0))
        rejected = iter(range(7, 17))
        prompts = {task.train_prompt(f.example).token_ids for f in (*FRESH, *OLD)}
        for real, other in zip(batch[0::2], batch[1::2], strict=True):
            if other.kind == FAKE:
                (prompt,) = (p for p in prompts if other.token_ids[: len(p)] == p and real.token_ids[: len(p)] == p)
                assert real.token_ids != other.token_ids
            else:
                example = task.real_example(next(rejected))
                assert real.token_ids == example.sequence
                assert other.token_ids == (*example.rejected[0][0], *example.response)

    def test_without_a_buffer_all_fakes_are_new_and_few_are_repeated(self, task):
        batch, _ = draw_batch(task, state(buffer=(), fresh=FRESH[:3]), self.CONFIG, random.Random(0))
        assert sum(x.kind == FAKE for x in batch) == 10
        assert len({x.token_ids for x in batch if x.kind == FAKE}) <= 3

    def test_each_fresh_one_at_most_once(self, task):
        config = DiscriminatorConfig(batch_size=80, fake_share=1.0, old_share=0.0)
        batch, after = draw_batch(task, state(), config, random.Random(0))
        assert len({x.token_ids for x in batch if x.kind == FAKE}) == 40 and after.examples_seen == 7

    def test_held_out(self, task):
        known = held_out(task, 16)
        assert [x.kind for x in known] == [REAL] * 16 + [REJECTED] * 16
        trained, _ = draw_batch(task, state(), self.CONFIG, random.Random(0))
        assert not {x.token_ids for x in known} & {x.token_ids for x in trained if x.kind == REAL}


class TestMemory:
    def test_everything_as_long_as_there_is_room(self):
        got = state().remembered(100, random.Random(0))
        assert got.buffer == OLD + FRESH and got.fresh == ()
        assert state().remembered(0, random.Random(0)).buffer == ()

    def test_old_ones_fade(self):
        """20 of 60 stay, drawn from all: a third of the old ones, not none as in a queue."""
        kept = [state().remembered(20, random.Random(seed)).buffer for seed in range(200)]
        assert {len(buffer) for buffer in kept} == {20}
        old = sum(fake in OLD for buffer in kept for fake in buffer) / 200
        assert old == pytest.approx(20 / 3, abs=0.6)

    def test_a_checkpoint_gives_all_of_it_back(self, tmp_path):
        whole = state(updates=9, accuracy=0.7, normaliser=Normaliser.of(torch.tensor([1.0, 4.0])))
        progress = Progress(step=3, discriminator=whole)
        write_progress(tmp_path / "rollouts.safetensors", progress)
        plain = Progress.of(asdict(progress.without_rollouts()))
        assert read_progress(tmp_path / "rollouts.safetensors", plain) == progress


class TestSeparation:
    SCORES = {
        "real": torch.tensor([2.0, 1.0, -1.0, 0.0]),
        "rejected": torch.tensor([-1.0, 3.0]),
        "fake": torch.tensor([-2.0, -1.0, 0.5, -3.0]),
    }

    def test_by_hand(self):
        got = {k: v.item() for k, v in separation(self.SCORES, "bce", fake_share=0.75).items()}
        assert got["real_accuracy"] == 2.5 / 4 and got["rejected_accuracy"] == 1 / 2 and got["fake_accuracy"] == 3 / 4
        assert got["accuracy"] == pytest.approx((2.5 / 4 + 0.75 * 3 / 4 + 0.25 / 2) / 2)
        assert (got["real_score"], got["rejected_score"], got["fake_score"]) == (0.5, 1.0, -1.375)
        assert got["logit_gap"] == 1.875

    def test_order_is_what_counts_in_pairs(self):
        """2 and 1 are above all fakes, -1 above two and a tie, 0 above three; shifting everything changes nothing."""
        fake = (4 + 4 + 2.5 + 3) / 16
        rejected = (1 + 1 + 0.5 + 1) / 8
        got = separation(self.SCORES, "bradley_terry", fake_share=0.75)["accuracy"].item()
        assert got == pytest.approx(0.75 * fake + 0.25 * rejected)
        moved = {kind: x + 100 for kind, x in self.SCORES.items()}
        assert separation(moved, "bradley_terry", fake_share=0.75)["accuracy"].item() == got

    def test_without_rejected_ones_fakes_are_all(self):
        scores = self.SCORES | {"rejected": torch.tensor([])}
        got = {k: v.item() for k, v in separation(scores, "bce", fake_share=0.5).items()}
        assert got["accuracy"] == (2.5 / 4 + 3 / 4) / 2 and "rejected_accuracy" not in got
        assert all(map(math.isfinite, got.values()))

    def test_a_new_head_is_half_right(self):
        zeros = {kind: torch.zeros(5) for kind in self.SCORES}
        for objective in ("bce", "bradley_terry"):
            got = separation(zeros, objective, 0.5)
            assert got["accuracy"] == 0.5 and got["calibration_error"] == pytest.approx(0, abs=0.2)


class TestFiles:
    """Preferential prompts of the user's files."""

    ROW = {"prompt": "4=", "response": "0123", "rejected_prompt": "5=", "rejected": "012"}

    def task(self, tmp_path, tokenizer, row, **data):
        for name in ("train", "eval"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
        files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
        return build_task(DataConfig(task="file", **files, **data), tokenizer, 0)

    def test_rows(self, tmp_path, tokenizer):
        task = self.task(tmp_path, tokenizer, self.ROW)
        (example, _) = task.eval_real_examples(2)
        eos = tokenizer.eos_token
        assert example == task.real_example(0) == task.real_example(3)
        texts = [tokenizer.decode(x) for x in (example.sequence, *((*p, *r) for p, r in example.rejected))]
        assert texts == [f"4=0123{eos}", f"5=0123{eos}", f"4=012{eos}"]

    def test_a_chat_and_the_keys_of_preference_pairs(self, tmp_path, tokenizer):
        row = {
            "prompt": "4",
            "chosen": "0123",
            "rejected_prompt": [{"role": "user", "content": "5"}, {"role": "assistant", "content": "x"}],
        }
        task = self.task(tmp_path, tokenizer, row, system_prompt="9")
        example = task.real_example(0)
        assert tokenizer.decode(example.prompt) == "9:4=" and tokenizer.decode(example.response[:-1]) == "0123"
        assert tokenizer.decode(example.rejected[0][0]) == "9:5="

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rejected_prompt": 3}, "'rejected_prompt' must be text or a list of messages, got int"),
            ({"rejected_prompt": "4="}, "the same as what is real"),
            ({"rejected": "0123"}, "the same as what is real"),
            ({"response": None}, "need 'chosen'"),
        ],
    )
    def test_mistakes_name_the_row(self, tmp_path, tokenizer, change, words):
        task = self.task(tmp_path, tokenizer, self.ROW | change)
        with pytest.raises(ValueError, match=words):
            task.real_example(0)

    def test_before_a_run(self, tmp_path, tokenizer):
        def check(row, **sections):
            config = parse_config({"name": "x", "model": {"path": "m"}} | sections)
            return check_examples(config, self.task(tmp_path, tokenizer, row))

        assert check(self.ROW) == 2 + 5
        without = {"prompt": "4=", "response": "0123"}
        with pytest.raises(ValueError, match="discriminator.fake_share=1 to learn"):
            check(without)
        assert check(without, discriminator={"fake_share": 1.0}) == 2 + 5
        with pytest.raises(ValueError, match="5 tokens and the policy may write rollout.max_response_tokens=4"):
            check(self.ROW, rollout={"max_response_tokens": 4})

    def test_a_task_without_real_answers_says_so(self, tokenizer):
        config = parse_config({"name": "x", "model": {"path": "m"}, "discriminator": {"fake_share": 1.0}})
        assert check_examples(config, build_task(DataConfig(), tokenizer, 0)) == 17 + 18  # digit_sort has them
        with pytest.raises(ValueError, match="no reference responses"):
            check_examples(config, build_task(DataConfig(task="reasoning_gym/chain_sum"), tokenizer, 0))
