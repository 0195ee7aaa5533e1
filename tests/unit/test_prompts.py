import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_rl.config import DataConfig
from mcore_rl.data.tasks import build_task
from tools.make_demo_model import make_tokenizer

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def file_task(tmp_path, tokenizer, rows, seed=0, **data):
    file = write(tmp_path / "train.jsonl", rows)
    return build_task(DataConfig(**{"task": "file", "train_file": file, "eval_file": file, **data}), tokenizer, seed)


def test_rows_become_prompts(tmp_path, tokenizer):
    task = file_task(tmp_path, tokenizer, ["\n", *ROWS])
    prompt = task.eval_prompts(3)[2]
    assert (prompt.id, prompt.text, prompt.answer, prompt.metadata) == ("train.jsonl:4", "2+1=", "3", {"level": 2})
    assert tokenizer.decode(prompt.token_ids) == "2+1="
    assert len(task.eval_prompts(100)) == 7
    assert task.max_prompt_tokens == 4


def test_every_epoch_is_a_new_order_of_the_same_prompts(tmp_path, tokenizer):
    task = file_task(tmp_path, tokenizer, ROWS)
    drawn = [task.train_prompt(i).text for i in range(21)]
    epochs = [drawn[0:7], drawn[7:14], drawn[14:21]]
    assert all(Counter(epoch) == Counter(row["prompt"] for row in ROWS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = file_task(tmp_path, tokenizer, ROWS)
    assert [resumed.train_prompt(i).text for i in range(20, 9, -1)] == drawn[20:9:-1]
    assert [file_task(tmp_path, tokenizer, ROWS, seed=1).train_prompt(i).text for i in range(7)] != epochs[0]


def test_parquet_gives_the_same_prompts(tmp_path, tokenizer):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    from_parquet = file_task(tmp_path, tokenizer, ROWS, eval_file=str(path)).eval_prompts(7)
    from_json = file_task(tmp_path, tokenizer, ROWS).eval_prompts(7)
    assert [(p.text, p.answer, p.metadata) for p in from_parquet] == [(p.text, p.answer, p.metadata) for p in from_json]
    assert from_parquet[0].id == "train.parquet:1"


def test_chats_are_rendered_and_a_last_assistant_message_is_the_response(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}]
    task = file_task(tmp_path, tokenizer, [{"messages": chat, "answer": "7"}], prompt_key="messages", system_prompt="1")
    assert task.train_prompt(0).text == "1:3+4="
    prompt_ids, response_ids = task.sft_example(0)
    assert tokenizer.decode(prompt_ids + response_ids) == "1:3+4=7<eos>"


def test_a_rows_own_system_message_wins(tmp_path, tokenizer):
    chat = [{"role": "system", "content": "2"}, {"role": "user", "content": "3"}]
    task = file_task(tmp_path, tokenizer, [{"messages": chat}], prompt_key="messages", system_prompt="1")
    assert task.train_prompt(0).text == "2:3="


def test_a_system_prompt_makes_text_a_chat(tmp_path, tokenizer):
    assert file_task(tmp_path, tokenizer, [{"prompt": "3"}], system_prompt="1").train_prompt(0).text == "1:3="


def test_sft_needs_responses(tmp_path, tokenizer):
    rows = [{"prompt": "1=", "answer": "1", "gold": "#1"}]
    prompt_ids, response_ids = file_task(tmp_path, tokenizer, rows, params={"response_key": "gold"}).sft_example(5)
    assert tokenizer.decode(prompt_ids + response_ids) == "1=#1<eos>"
    with pytest.raises(ValueError, match="train.jsonl:1 has no reference response"):
        file_task(tmp_path, tokenizer, rows).sft_example(0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], '{"prompt": "1=", \n'], r"train.jsonl:2: malformed JSON"),
        ([ROWS[0], "[1]\n"], r"train.jsonl:2: expected a JSON object, got list"),
        ([ROWS[0], {"question": "1="}], r"train.jsonl:2: key 'prompt' is missing; keys here: question"),
        ([{"prompt": 5}], r"train.jsonl:1: 'prompt' must be text or a list of messages, got int '5'"),
        ([{"prompt": ""}], r"train.jsonl:1: 'prompt' is empty"),
        ([{"prompt": [{"role": "usr", "content": "1"}]}], r"train.jsonl:1: 'prompt', message 0: expected"),
        ([{"prompt": [{"role": "user"}]}], r"train.jsonl:1: 'prompt', message 0: expected"),
        ([{"prompt": [{"role": "assistant", "content": "1"}]}], r"train.jsonl:1: the only message is the assistant's"),
        ([ROWS[0], {"prompt": "1=" * 9}], r"train.jsonl:2: prompt has 18 tokens, more than the 17"),
        ([ROWS[0], {"prompt": "1="}], r"train.jsonl:2: key 'answer' must be in every row or in none"),
        ([{"prompt": "one"}], r"train.jsonl:1: the tokenizer cannot encode 'one'"),
        ([{"prompt": "1", "response": 3}], r"train.jsonl:1: 'response' must be text, got int"),
        ([], r"train.jsonl' is empty"),
        (["\n", "\n"], r"train.jsonl' is empty"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        file_task(tmp_path, tokenizer, rows, max_prompt_tokens=17)


def test_mistakes_of_whole_files(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "x.parquet").write_text("hello")
    files = {"no.jsonl": "does not exist", "x.txt": "suffix '.txt'", "x.parquet": "not a parquet file"}
    for name, message in files.items():
        with pytest.raises(ValueError, match=message):
            file_task(tmp_path, tokenizer, ROWS, train_file=str(tmp_path / name))
    with pytest.raises(ValueError, match="data.eval_file"):
        file_task(tmp_path, tokenizer, ROWS, eval_file=None)
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "1="}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:2: malformed JSON"):
        file_task(tmp_path, tokenizer, ROWS, train_file=str(tmp_path / "bad.jsonl"))


def test_chat_without_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="train.jsonl:1: .*need a chat template"):
        file_task(tmp_path, tokenizer, [{"prompt": [{"role": "user", "content": "1"}]}])
