"""Examples: what a JSONL file may hold, what its errors say, and how splits are drawn."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlens.examples import Example, ExampleError, digest, read, splits


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


class TestRead:
    def test_every_key(self, tmp_path):
        chat = [{"role": "user", "content": "Hi there"}]
        found = read(
            written(
                tmp_path,
                {"prompt": "a bc", "answer": "d", "alternatives": ["e", "f"], "emphasize": "bc", "key": "k"},
                "",
                {"messages": chat, "emphasize": ["Hi", "there"], "groups": {"gold": "there", "context": ["Hi"]}},
                {"prompt": "naïve \u2028 ☃"},
            )
        )
        assert found == [
            Example("a bc", "d", ("e", "f"), {"emphasis": ("bc",)}, "k"),
            Example(tuple(chat), None, (), {"gold": ("there",), "context": ("Hi",), "emphasis": ("Hi", "there")}),
            Example("naïve \u2028 ☃"),
        ]
        assert found[0].key == "k" and json.loads(found[1].key) == chat

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ("{", "Expecting property name"),
            ("[1]", "'[1]' is not a JSON object"),
            ({"prompt": "a", "answr": "b"}, "unknown key 'answr'; allowed: prompt, messages, answer"),
            ({"answer": "b"}, "either 'prompt' or 'messages' is needed, not neither"),
            ({"prompt": "a", "messages": []}, "either 'prompt' or 'messages' is needed, not both"),
            ({"prompt": " "}, "'prompt' is ' '; it must be a text, not empty"),
            ({"prompt": 3}, "'prompt' is 3; it must be a text"),
            ({"messages": []}, "'messages' is []; it must be a list of {'role': …, 'content': …}, not empty"),
            ({"messages": "a"}, "'messages' is 'a'"),
            ({"messages": [{"role": "user"}]}, "'messages' is [{'role': 'user'}]"),
            ({"messages": [{"role": 1, "content": "a"}]}, "'messages' is"),
            ({"prompt": "a", "answer": ""}, "'answer' is ''; it must be a text, not empty"),
            ({"prompt": "a", "answer": 4}, "'answer' is 4"),
            ({"prompt": "a", "emphasize": [1]}, "'emphasize' is [1]; it must be a text or a list of texts"),
            ({"prompt": "a", "emphasize": ""}, "'emphasize' is ''"),
            ({"prompt": "a", "alternatives": {}}, "'alternatives' is {}"),
            ({"prompt": "a", "groups": ["a"]}, "'groups' is ['a']; it must be {name: texts}"),
            ({"prompt": "a", "groups": {"gold": 1}}, "'groups.gold' is 1"),
            ({"prompt": "a", "groups": {"emphasis": "a"}, "emphasize": "a"}, "'emphasize' and 'groups.emphasis'"),
            ({"prompt": "a", "key": 1}, "'key' is 1; it must be a text"),
        ],
    )
    def test_an_error_names_the_line_and_the_value(self, row, said, tmp_path):
        path = written(tmp_path, {"prompt": "fine"}, "", row)
        with pytest.raises(ExampleError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:3: ") and said in str(error.value)
        assert error.value.exit_code == 2 and "\n" not in str(error.value)

    def test_files_that_hold_nothing(self, tmp_path):
        with pytest.raises(ExampleError, match=r"rows.jsonl holds no example; it needs a JSON object per line"):
            read(written(tmp_path, "", "  "))
        with pytest.raises(ExampleError, match=r"none.jsonl cannot be read: No such file"):
            read(tmp_path / "none.jsonl")
        with pytest.raises(ExampleError, match="cannot be read"):
            read(tmp_path)
        (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
        with pytest.raises(ExampleError, match=r"latin.jsonl cannot be read: .*utf-8"):
            read(tmp_path / "latin.jsonl")

    def test_a_mark_of_byte_order(self, tmp_path):
        """As editors on Windows write it."""
        path = tmp_path / "bom.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
        assert read(path) == [Example("a"), Example("b")]

    def test_text_with_line_separators_is_one_line(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", "utf-8")
        assert read(path) == [Example("a\u2028b\x85c")]

    def test_deep_nesting_is_an_error_of_its_line(self, tmp_path):
        with pytest.raises(ExampleError, match=r"rows.jsonl:1: "):
            read(written(tmp_path, "[" * 100_000))


class TestDigest:
    def test_it_tells_apart_what_shapes_a_score(self):
        base = Example("p", "a", ("b",), {"emphasis": ("p",)}, "k")
        others = [
            Example("q", "a", ("b",), {"emphasis": ("p",)}, "k"),
            Example("p", "c", ("b",), {"emphasis": ("p",)}, "k"),
            Example("p", "a", (), {"emphasis": ("p",)}, "k"),
            Example("p", "a", ("b",), {"emphasis": ()}, "k"),
            Example("p", "a", ("b",), {"gold": ("p",)}, "k"),
        ]
        found = [digest([example]) for example in [base, *others]] + [
            digest([base, others[0]]),
            digest([others[0], base]),
        ]
        assert len(set(found)) == len(found)
        assert digest([base]) == digest([Example("p", "a", ("b",), {"emphasis": ("p",)}, "k")])

    def test_the_order_of_groups_does_not_count(self):
        one, two = ({"a": ("x",), "b": ("y",)}, {"b": ("y",), "a": ("x",)})
        assert digest([Example("p", groups=one)]) == digest([Example("p", groups=two)])


class TestSplits:
    SIZES = {"profile": 10, "validation": 20, "test": 30}

    def rows(self, count=100):
        return [Example(f"p{i}") for i in range(count)]

    def test_the_seed_draws(self):
        found = [splits(self.rows(), self.SIZES, seed) for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]
        # seeds share no more than chance does
        common = {e.key for e in found[0]["test"]} & {e.key for e in found[2]["test"]}
        assert len(common) < 20

    def test_the_order_of_the_file_does_not_count(self):
        rows = self.rows()
        shuffled = random.Random(3).sample(rows, len(rows))
        assert splits(rows, self.SIZES, 0) == splits(shuffled, self.SIZES, 0)

    @given(st.lists(st.integers(0, 12), min_size=20, max_size=60), st.integers(0, 9))
    def test_a_key_is_in_one_split(self, keys, seed):
        rows = [Example(f"p{i}", key=str(key)) for i, key in enumerate(keys)]
        try:
            found = splits(rows, {"a": 4, "b": 5}, seed)
        except ExampleError:
            return
        assert not {e.key for e in found["a"]} & {e.key for e in found["b"]}
        assert len({e.prompt for part in found.values() for e in part}) == 9

    def test_equal_prompts_are_one_key(self):
        rows = [Example(f"p{i % 30}", answer=str(i)) for i in range(60)]
        found = splits(rows, {"a": 20, "b": 20}, 0)
        assert not {e.prompt for e in found["a"]} & {e.prompt for e in found["b"]}
