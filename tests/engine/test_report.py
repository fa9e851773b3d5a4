"""The report: what is written is read back, what is none is refused, and names cannot break the page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from lmdserve.engine.api import ConfigError
from lmdserve.engine.quantize.quality import Quality, QualityRow
from lmdserve.engine.quantize.report import (
    FormatOfWeights,
    LayerRow,
    PeakMemory,
    Report,
    SizeBytes,
    read_report,
    report_table,
    write_report,
)

REPORT = Report(
    source="/models/tiny",
    output="/models/tiny-4bit/",
    created="2026-11-21T04:00:00+00:00",
    format=FormatOfWeights(method="awq", bits=4, group_size=128, symmetric=False),
    size_bytes=SizeBytes(before=3 * 2**30, after=2**30),
    layers=[
        LayerRow(layer=0, linear="attention.wqkv", relative_error=0.0123, bits=4),
        LayerRow(layer=0, linear="feed_forward.w2", relative_error=None, bits=16, reason="weights past the range"),
        LayerRow(layer=1, linear="attention.wqkv", relative_error=0.2, bits=4),
    ],
    quality=Quality(
        text="builtin",
        num_tokens=8192,
        rows=[
            QualityRow(
                weights="16-bit",
                kv_bits=16,
                perplexity=6.5,
                perplexity_increase=0.0,
                kl_divergence=0.0,
                top1_agreement=1.0,
            ),
            QualityRow(
                weights="4-bit",
                kv_bits=8,
                perplexity=None,
                perplexity_increase=None,
                kl_divergence=0.0421,
                kl_divergence_error=0.00053,
                top1_agreement=0.9,
            ),
        ],
    ),
    time_s={"search": 61.25, "write": 2.0},
    peak_memory_bytes=PeakMemory(device=0, host=5 * 2**20),
)


class Page(HTMLParser):
    """Collects the text and the tags of a page, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert write_report(tmp_path, REPORT) == tmp_path / "report.json"
    assert read_report(tmp_path) == REPORT
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["size_bytes"] == {"before": 3 * 2**30, "after": 2**30}
    assert values["quality"]["rows"][1]["perplexity"] is None
    assert values["layers"][0]["reason"] is None


def test_a_report_without_a_measurement_is_one(tmp_path: Path) -> None:
    report = msgspec.structs.replace(REPORT, quality=None)
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report
    assert "perplexity" not in report_table(report)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no report of lmdserve"),
        ("[]", "no report of lmdserve"),
        ('{"source": "a"}', "missing required field"),
        ("\xff", "no report of lmdserve"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_report(tmp_path)
    assert "report.json" in str(caught.value)


def test_a_number_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    values = json.loads((tmp_path / "report.json").read_text())
    values["quality"]["rows"][1]["kl_divergence"] = "0.01"
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"kl_divergence"):
        read_report(tmp_path)


def test_a_folder_without_a_report_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lmdserve quantize"):
        read_report(tmp_path)


def test_the_table_has_every_number() -> None:
    lines = report_table(REPORT).splitlines()
    assert lines[1] == "awq, 4 bits, groups of 128, asymmetric: 3.00 GiB -> 1.00 GiB (33%)"
    assert lines[4].split() == [
        "weights",
        "KV",
        "bits",
        "perplexity",
        "increase",
        "KL",
        "nats/token",
        "same",
        "top",
        "token",
    ]
    assert lines[5].split() == ["16-bit", "16", "6.5000", "+0.00%", "0.00e+00", "100.00%"]
    assert lines[6].split() == ["4-bit", "8", "not", "finite", "not", "finite", "4.21e-02", "±", "5e-04", "90.00%"]
    assert len({len(line) for line in lines[4:7]}) == 1
    rest = "\n".join(lines[7:])
    assert rest.index("layer 1 attention.wqkv") < rest.index("layer 0 attention.wqkv")
    assert "layer 0 feed_forward.w2 has 16 bits: weights past the range" in rest
    assert "time: search 61.2 s, write 2.0 s" in rest
    assert "device 0.0 MiB, host 5.0 MiB" in rest


def test_the_page_holds_the_report_and_fetches_nothing(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    for part in (
        "tiny-4bit",
        "6.5000",
        "not finite",
        "4.21e-02 ± 5e-04",
        "90.00%",
        "1.2e-02",
        "weights past the range",
        "61.2 s",
    ):
        assert part in page.text
    assert "url(" not in page.text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    evil = '</title><script>alert("1")</script>&amp;'
    report = msgspec.structs.replace(
        REPORT,
        source=evil,
        output=evil,
        created=evil,
        time_s={evil: 1.0},
        layers=[LayerRow(layer=0, linear=evil, relative_error=0.1, bits=16, reason=evil)],
        quality=Quality(text=evil, num_tokens=1, rows=REPORT.quality.rows if REPORT.quality else []),
    )
    write_report(tmp_path, report)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.open == []
    assert page.text.count(evil) >= 6
