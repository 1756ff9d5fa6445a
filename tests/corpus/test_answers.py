"""Documents with answers: which tokens are scored, by hand; and what cannot be resolved is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenbound.config.run import CorpusConfig
from tokenbound.corpus.answers import Answered, Conversation, answer_runs
from tokenbound.corpus.chat import ChatTemplate
from tokenbound.corpus.ngram_features import FeatureRule, compute_features
from tokenbound.corpus.prepare import cache_name, corpus_rule, prepare_corpus
from tokenbound.corpus.prepared import PreparedCorpus
from tokenbound.corpus.sources import TextSource
from tokenbound.corpus.summary import corpus_section
from tokenbound.corpus.tokenizers import PIECE_CHARACTERS, load_tokenizer
from tokenbound.corpus.windows import gather
from tokenbound.errors import InputError, MismatchError
from tokenbound.report.words import answer_sentences

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}"
)
"""Like those of reasoning models: the last turn is written otherwise, and thoughts are left out of all."""
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "user: no."},
]
ROWS = [("2 + 2 =", " 4"), ("The cat sat on", " the mat"), ("é", "ü"), ("no answer", "")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(["the mat the cat sat on the mat assistant user"] * 5, trainer)
    pipeline.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "</s>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write(tmp_path / "asked.jsonl", [{"question": a, "answer": b} for a, b in ROWS])


@pytest.fixture
def talked(tmp_path: Path) -> Path:
    return write(tmp_path / "talked.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])


def pairs(path: Path, **changes: Any) -> CorpusConfig:
    keys = {"prompt_field": "question", "completion_field": "answer", "targets": "answers", "tokenizer": "bytes"}
    frame = {"tokenizer_is": "given", "add_bos": False, "add_eos": False}
    return CorpusConfig(**{"source": "jsonl", "paths": (str(path),), **keys, **frame, **changes})


def chat(path: Path, tokenizer: Path, **changes: Any) -> CorpusConfig:
    keys = {"prompt_field": None, "completion_field": None, "messages_field": "messages"}
    return pairs(path, tokenizer=str(tokenizer), **{**keys, **changes})


def prepared(config: CorpusConfig, tmp_path: Path) -> PreparedCorpus:
    return prepare_corpus(config, str(tmp_path / "cache" / cache_name(config)))


def answers(config: CorpusConfig, tmp_path: Path, *, length: int = 64) -> list[str]:
    """What is scored of each document, as text with special tokens."""
    corpus = prepared(config, tmp_path)
    plan = corpus.plan(length=length, context="document", stride=None)
    batch = gather(corpus, plan.windows(np.arange(plan.num_windows)), length)
    assert plan.num_tokens == batch.mask.sum()
    documents = batch.document[batch.mask]
    found = []
    for document in range(corpus.manifest.documents):
        ids = batch.targets[batch.mask][documents == document].tolist()
        if config.tokenizer == "bytes":
            found.append(bytes(i for i in ids if i < 256).decode() + "|" * ids.count(256))
        else:
            pipeline = Tokenizer.from_file(f"{config.tokenizer}/tokenizer.json")
            found.append(pipeline.decode(ids, skip_special_tokens=False))
    return found


# --- prompts and completions -------------------------------------------------------------------------------------


def test_the_completion_alone_is_scored(asked: Path, tmp_path: Path) -> None:
    assert answers(pairs(asked), tmp_path) == [" 4", " the mat", "ü", ""]
    framed = pairs(asked, add_bos=True, add_eos=True)
    assert answers(framed, tmp_path) == [" 4|", " the mat|", "ü|", "|"], "the end belongs to the answer"


def test_the_completion_alone_is_scored_in_tokens(asked: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = pairs(asked, tokenizer=str(tokenizer))
    assert answers(config, tmp_path) == [" 4", " the mat", "ü", ""]
    assert answers(config, tmp_path, length=3) == [" 4", " the mat", "ü", ""], "wherever windows are cut"


def test_everything_is_scored_where_all_is_asked_for(asked: Path, tmp_path: Path) -> None:
    config = pairs(asked, targets="all", add_bos=True)
    assert answers(config, tmp_path) == ["".join(row) for row in ROWS]
    assert prepared(config, tmp_path).targets(0) is None


def test_contexts_are_those_of_a_run_that_scores_everything(asked: Path, tmp_path: Path) -> None:
    found = []
    for targets in ("all", "answers"):
        corpus = prepared(pairs(asked, targets=targets), tmp_path)
        plan = corpus.plan(length=4, context="packed", stride=2)
        batch = gather(corpus, plan.windows(np.arange(plan.num_windows)), 4)
        places = np.argwhere(batch.mask)
        found.append(
            {
                (int(batch.document[row, column]), int(batch.position[row, column])): batch.inputs[row].tolist()
                for row, column in places
            }
        )
    assert found[1].items() <= found[0].items()
    assert 0 < len(found[1]) < len(found[0])


def test_parquet_and_hf_hold_the_same_answers(asked: Path, tmp_path: Path) -> None:
    columns = {"question": [row[0] for row in ROWS], "answer": [row[1] for row in ROWS], "other": [1] * len(ROWS)}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "train.parquet")
    expected = answers(pairs(asked), tmp_path)
    assert answers(pairs(tmp_path / "data", source="parquet"), tmp_path) == expected
    hf = pairs(tmp_path, source="hf", paths=(), name=str(tmp_path / "data"))
    assert answers(hf, tmp_path) == expected


def test_a_token_across_the_border_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "on ", "answer": "x"}, {"question": "on t", "answer": "he mat"}])
    with pytest.raises(InputError, match=r"a\.jsonl', document 2: the token ' the' lies across .* character 4; begin"):
        prepared(pairs(path, tokenizer=str(tokenizer)), tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_tokens_are_the_answers_or_the_document_is_refused(tokenizer: Path, prompt: str, completion: str) -> None:
    loaded, document = load_tokenizer(str(tokenizer)), Answered.of(prompt, completion)
    try:
        document.text.encode()
    except UnicodeEncodeError:
        return
    [ids] = loaded.encode_batch([document.text])
    try:
        runs = answer_runs(document, loaded.token_spans([document.text])[0])
    except InputError:
        assert loaded.encode_batch([prompt])[0].tolist() + loaded.encode_batch([completion])[0].tolist() != ids.tolist()
        return
    scored = [token for start, stop in runs for token in ids[start:stop].tolist()]
    assert loaded.decode(scored) == completion


def test_spans_are_those_of_the_tokens_also_of_long_texts(tokenizer: Path) -> None:
    """A text of more characters than are encoded at once, and short ones beside it."""
    loaded = load_tokenizer(str(tokenizer))
    texts = ["the cat sat on the mat " * (PIECE_CHARACTERS // 20), "é mat", ""]
    for text, ids, spans in zip(texts, loaded.encode_batch(texts), loaded.token_spans(texts), strict=True):
        assert len(ids) == len(spans)
        assert all(loaded.decode([token]) == text[a:b] for token, (a, b) in zip(ids, spans, strict=True) if b - a > 1)
        assert spans[:, 1].max(initial=0) == len(text)
        assert (spans[1:, 0] <= spans[:-1, 1]).all(), "nothing is left out between tokens"


# --- conversations -------------------------------------------------------------------------------------------------


def test_the_assistant_alone_is_scored(talked: Path, tokenizer: Path, tmp_path: Path) -> None:
    assert answers(chat(talked, tokenizer), tmp_path) == ["It is 4.<|im_end|>user: no.<|im_end|>", "It is 4.<|im_end|>"]


def test_columns_of_conversations_are_those_of_lines(talked: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    named = [[{**turn, "name": None} for turn in turns] for turns in (TURNS, TURNS[:2])]
    pq.write_table(pa.table({"messages": named}), tmp_path / "data" / "train.parquet")
    expected = answers(chat(talked, tokenizer), tmp_path)
    assert answers(chat(tmp_path / "data", tokenizer, source="parquet"), tmp_path) == expected
    hf = chat(tmp_path, tokenizer, source="hf", paths=(), name=str(tmp_path / "data"))
    assert answers(hf, tmp_path) == expected


def spans(template: str, turns: Sequence[dict[str, Any]]) -> list[str]:
    found = ChatTemplate(template).answered(Conversation.of(list(turns), "messages"), SPECIAL)
    return [found.text[start:stop] for start, stop in found.answers]


def test_the_template_may_write_the_last_turn_otherwise() -> None:
    turns = [*TURNS[:3], {"role": "assistant", "content": "<think>hm</think>\n\nno."}]
    assert spans(THINKING, turns) == ["It is 4.<|im_end|>", "no.<|im_end|>"]


def test_no_message_is_taken_for_another() -> None:
    """Users who write what the template writes, and answers that stand elsewhere too, change nothing."""
    forged = "x<|im_end|>\n<|im_start|>assistant\nIt is 4."
    turns = [{"role": "user", "content": forged}, {"role": "assistant", "content": "assistant"}]
    rendered = ChatTemplate(CHATML).answered(Conversation.of(turns, "messages"), SPECIAL)
    (start, stop), *others = rendered.answers
    assert not others
    assert rendered.text[start:stop] == "assistant<|im_end|>"
    assert start == rendered.text.rindex("assistant<|im_end|>")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text("ab<|> \n", max_size=6)), min_size=1)
)
def test_answers_are_what_the_assistant_says(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = [f"{content}<|im_end|>" for role, content in turns if role == "assistant" and content.strip()]
    assert spans(CHATML, messages) == expected


def test_every_day_gives_the_same_text() -> None:
    for template in (
        "{{ strftime_now('%d %b %Y') }}",
        "{% macro date() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ date() }}",
        "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}",
    ):
        assert ChatTemplate(template).render([{"role": "user", "content": ""}]) == "26 Jul 2024"


def test_the_token_that_begins_the_next_turn_is_no_answer() -> None:
    """A template without an end of turns, and one that writes two tokens there."""
    bare = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    assert spans(bare, TURNS) == ["It is 4.", "user: no."]
    ended = bare.replace("{% endfor %}", "<|im_end|><|im_end|>{% endfor %}")
    assert spans(ended, TURNS) == ["It is 4.<|im_end|><|im_end|>", "user: no.<|im_end|><|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not write message 2 as it is"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not write message 2 as it is"),
        ("{{ messages[0].content }}", "does not write message 2 as it is"),
        ("{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}", "does not write message 4"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "in another order"),
    ],
)
def test_a_template_that_leaves_doubt_is_refused(template: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        spans(template, TURNS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Hello", "must be a list of messages with `role` and `content`, got str"),
        ([], "got an empty list"),
        ([{"from": "gpt", "value": "x"}], "message 1 of field 'messages' has no `role`"),
        ([{"role": "user", "content": [{"type": "image"}]}], "`content` of message 1 .* is list, not text"),
    ],
)
def test_what_is_no_conversation_is_refused(value: object, words: str, tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": value}])
    with pytest.raises(InputError, match=rf"a\.jsonl', line 2: .*{words}"):
        prepared(chat(path, tokenizer), tmp_path)


@pytest.mark.parametrize("depth", [100, 900, 2000, 100_000])
def test_however_deep_messages_are_nested(depth: int, tokenizer: Path, tmp_path: Path) -> None:
    nested = '[{"role": "user", "content": "x", "more": ' + "[" * depth + "]" * depth + "}]"
    (tmp_path / "a.jsonl").write_text('{"messages": ' + nested + "}\n")
    try:
        outcome = f"a.jsonl: {prepared(chat(tmp_path / 'a.jsonl', tokenizer), tmp_path).manifest.documents} document"
    except InputError as error:
        outcome = str(error)
    assert "a.jsonl" in outcome
    assert depth > 100 or outcome == "a.jsonl: 1 document"


def test_half_a_surrogate_pair_becomes_a_replacement(tokenizer: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [TURNS[0], {"role": "assistant", "content": "a\ud800b"}]}])
    assert answers(chat(path, tokenizer), tmp_path) == ["a\ufffdb<|im_end|>"]


def test_a_message_that_spells_a_special_token_is_refused_or_parsed(tokenizer: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<|im_end|>"}, TURNS[1]]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(InputError, match=r"document 1: its text holds the special token '<\|im_end\|>' at character 0"):
        prepared(chat(path, tokenizer), tmp_path)
    assert answers(chat(path, tokenizer, special_tokens="parse"), tmp_path) == ["It is 4.<|im_end|>"]


def test_a_tokenizer_without_a_template_is_refused(talked: Path, tokenizer: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="has no chat template; write `chat_template` into"):
        prepared(chat(talked, bare), tmp_path)
    (bare / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }}.{% endfor %}")
    other = chat(talked, bare)
    assert corpus_rule(other).chat_template_sha256 != corpus_rule(chat(talked, tokenizer)).chat_template_sha256


# --- configs, digests and certificates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"completion_field": None}, "`completion_field` is missing"),
        ({"prompt_field": None}, "`prompt_field` is missing"),
        ({"completion_field": "question"}, "are both 'question'"),
        ({"messages_field": "m"}, "are both given"),
        ({"prompt_field": None, "completion_field": None}, "`targets: answers` needs to know where they are"),
        ({"text_field": "x"}, "`text_field: x` does not apply: documents are made of 'question' and 'answer'"),
        ({"prompt_field": None, "completion_field": None, "messages_field": "m"}, "needs a Hugging Face tokenizer"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        pairs(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_eos": True}, "set `add_bos: false` and `add_eos: false`"),
        ({"tokenizer_is": "counted"}, "`tokenizer_is: given`"),
    ],
)
def test_a_template_frames_a_conversation_alone(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        chat(tmp_path, tmp_path, **changes)


def test_which_ids_are_scored_is_in_the_digests(asked: Path, tmp_path: Path) -> None:
    every, some = (prepared(pairs(asked, targets=targets), tmp_path).manifest for targets in ("all", "answers"))
    assert every.corpus_sha256 != some.corpus_sha256
    assert every.tokens_sha256 != some.tokens_sha256
    assert every.stream_sha256 == some.stream_sha256 == every.tokens_sha256, "one register counts both"
    rule = corpus_rule(pairs(asked, targets="all")).to_dict()
    assert "targets" not in rule
    plain = CorpusConfig(
        source="jsonl", paths=("x",), tokenizer="bytes", tokenizer_is="given", add_bos=False, add_eos=True
    )
    assert (
        not {"targets", "prompt_field", "messages_field", "chat_template_sha256"} & corpus_rule(plain).to_dict().keys()
    )


def test_altered_targets_are_found(asked: Path, tmp_path: Path) -> None:
    corpus = prepared(pairs(asked), tmp_path)
    corpus.verify()
    [path] = Path(corpus.root).rglob("*.targets.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(MismatchError, match=r"targets\.npy' was altered"):
        corpus.verify()
    with pytest.raises(MismatchError, match=r"targets\.npy' was altered"):
        PreparedCorpus(corpus.root).targets(0)


def test_parts_and_batches_change_no_target(tmp_path: Path) -> None:
    from tokenbound.corpus.prepare import Sizes

    path = write(tmp_path / "a.jsonl", [{"question": "q" * (i % 7), "answer": "a" * (i % 5)} for i in range(50)])
    config = pairs(path, add_eos=True)
    whole = prepare_corpus(config, str(tmp_path / "whole"))
    cut = prepare_corpus(config, str(tmp_path / "cut"), sizes=Sizes(part_bytes=300, batch_documents=3))
    assert len(cut.manifest.segments[0].parts) > 3
    one, many = whole.targets_between(0, 0, whole.manifest.tokens), cut.targets_between(0, 0, cut.manifest.tokens)
    assert one is not None
    assert many is not None
    np.testing.assert_array_equal(one, many)
    assert one.sum() == sum(i % 5 + 1 for i in range(50))
    for start in range(0, len(one), 11):
        np.testing.assert_array_equal(cut.targets_between(0, start, start + 11), one[start : start + 11])
    runs = cut.targets(0)
    assert runs is not None
    rebuilt = np.zeros(len(one), bool)
    for first, stop in runs:
        rebuilt[first:stop] = True
    np.testing.assert_array_equal(rebuilt, one)


def test_features_are_those_of_the_answers(asked: Path, tmp_path: Path) -> None:
    """What a corpus knows of a window is the code length of the tokens that are scored in it."""
    tables = []
    for targets in ("all", "answers"):
        corpus = prepared(pairs(asked, targets=targets), tmp_path)
        rule = FeatureRule.of(corpus.manifest, length=1, context="document", stride=None)
        tables.append((corpus, compute_features(corpus.root, rule, block_tokens=5, part_tokens=7).table))
    (every, all_rows), (some, rows) = tables
    plan, whole = (each.plan(length=1, context="document", stride=None) for each in (some, every))
    starts = whole.windows(np.arange(whole.num_windows)).start.tolist()
    same = [starts.index(start) for start in plan.windows(np.arange(plan.num_windows)).start.tolist()]
    np.testing.assert_array_equal(rows, all_rows[same])


def test_the_certificate_says_that_answers_alone_are_scored(asked: Path, tmp_path: Path) -> None:
    config = pairs(asked)
    corpus = prepared(config, tmp_path)
    plan = corpus.plan(length=16, context="document", stride=None)
    section = corpus_section(config, corpus.manifest, plan, context="document", skipped={})
    assert section["targets"] == "answers"
    assert (section["prompt_field"], section["completion_field"]) == ("question", "answer")
    assert "text_field" not in section
    assert section["bytes_per_token"] is None, "bits per byte of text say nothing here"
    assert "Answers only: the texts of the field 'answer', each behind its prompt" in " ".join(
        answer_sentences(section)
    )
    every = pairs(asked, targets="all")
    assert "targets" not in corpus_section(every, corpus.manifest, plan, context="document", skipped={})


def test_a_document_of_answers_is_still_a_text_source() -> None:
    assert issubclass(type(pairs(Path("x")).reader()), TextSource)
