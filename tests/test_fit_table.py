"""Tables: what is read, what is refused, and in which words."""

import numpy as np
import pandas as pd
import pytest

from rayx.errors import FitError
from rayx.fit import Table

NUM_ROWS = 10


def csv_text(header, rows):
    return "\n".join([header, *rows]) + "\n"


def weight_rows(num=NUM_ROWS):
    return [f"r{i},{0.1 * i / num + 0.1:.3f},{0.9 - 0.1 * i / num:.3f}" for i in range(num)]


def loss_rows(num=NUM_ROWS):
    return [f"r{i},{3 + 0.01 * i:.3f},{2 + 0.02 * i:.3f}" for i in range(num)]


@pytest.fixture
def write(tmp_path):
    """Write the two files; a str replaces a file, bytes too, None leaves it out."""

    def write_files(weights="", losses=""):
        texts = {
            "w.csv": csv_text("id,web,code", weight_rows()) if weights == "" else weights,
            "l.csv": csv_text("id,x,y", loss_rows()) if losses == "" else losses,
        }
        for name, text in texts.items():
            if text is not None:
                data = text if isinstance(text, bytes) else text.encode()
                (tmp_path / name).write_bytes(data)
        return tmp_path / "w.csv", tmp_path / "l.csv"

    return write_files


def replaced(rows, index, row):
    return [row if i == index else old for i, old in enumerate(rows)]


def weights(index, row, header="id,web,code"):
    return csv_text(header, replaced(weight_rows(), index, row))


def losses(index, row, header="id,x,y"):
    return csv_text(header, replaced(loss_rows(), index, row))


BAD = {
    "weights file missing": (None, "", r"Cannot read .*w\.csv"),
    "losses file missing": ("", None, r"Cannot read .*l\.csv"),
    "empty file": (b"", "", r"w\.csv is empty; expected a header"),
    "header only": ("", "id,x,y\n", r"l\.csv is empty"),
    "blank lines only": ("\n\n \n", "", r"w\.csv is empty"),
    "one column": ("id\nr0\nr1\n", "", r"w\.csv has one column only \('id'\)"),
    "no common ids": (
        "",
        csv_text("id,x,y", [row.replace("r", "run-") for row in loss_rows()]),
        r"no ids in common: the first begins with 'r0', the second with 'run-0'",
    ),
    "duplicate ids": (weights(4, "r3,0.5,0.5"), "", r"id 'r3' occurs 2 times in .*w\.csv"),
    "duplicate columns": ("", losses(0, "r0,1,2", "id,x,x"), r"column 'x' occurs 2 times"),
    "non-numeric weight": (
        weights(2, "r2,half,0.5"),
        "",
        r"w\.csv, row 'r2', column 'web': the value is 'half'; expected a number",
    ),
    "non-numeric loss": (
        "",
        losses(7, "r7,3.0,oops"),
        r"l\.csv, row 'r7', column 'y': the value is 'oops'; expected a number",
    ),
    "empty weight": (weights(2, "r2,,1.0"), "", r"row 'r2', column 'web': the value is empty"),
    "negative weight": (
        weights(5, "r5,-0.25,1.25"),
        "",
        r"Run 'r5', column 'web': the value is -0.25; expected a weight of 0 or more",
    ),
    "row sums to zero": (weights(1, "r1,0,0"), "", r"weights of run 'r1' sum to 0; expected 1"),
    "row sums to 1.1": (weights(1, "r1,0.6,0.5"), "", r"run 'r1' sum to 1.1; expected 1 within 2%"),
    "percentages": (weights(1, "r1,60,40"), "", r"run 'r1' sum to 100; expected 1"),
    "infinite weight": (weights(6, "r6,inf,0.5"), "", r"Run 'r6', column 'web': the value is inf"),
    "nan weight": (weights(6, "r6,nan,0.5"), "", r"Run 'r6', column 'web': the value is nan"),
    "infinite loss": (
        "",
        losses(6, "r6,3,inf"),
        r"Run 'r6', column 'y': the value is inf; expected a finite loss",
    ),
    "target all missing": (
        "",
        csv_text("id,x,y", [f"r{i},3.0," for i in range(NUM_ROWS)]),
        r"Target 'y' has no loss in any of 10 runs",
    ),
    "too few rows": (
        "",
        csv_text("id,x,y", loss_rows(7)),
        r"w\.csv and .*l\.csv join to 7 rows; expected at least 8",
    ),
    "ragged row": (weights(3, "r3,0.5"), "", r"row 'r3': it has 2 cells; the header has 3"),
    "not utf-8": ("id,wéb,code\n".encode("latin-1"), "", r"w\.csv is not UTF-8 text \(byte 4\)"),
    "utf-16": ("id,web\n".encode("utf-16"), "", r"w\.csv is not UTF-8"),
    "zero bytes": (b"id,web\0\n", "", r"w\.csv holds zero bytes"),
}


@pytest.mark.parametrize(("weights_text", "losses_text", "words"), BAD.values(), ids=BAD)
def test_from_csv_bad_input_is_named(write, weights_text, losses_text, words):
    paths = write(weights_text, losses_text)
    with pytest.raises(FitError, match=words):
        Table.from_csv(*paths)


def test_from_csv_folder_is_named(tmp_path):
    with pytest.raises(FitError, match="Cannot read .*Is a directory"):
        Table.from_csv(tmp_path, tmp_path)


def test_from_csv_joins_by_id_whatever_the_order_and_renormalises(write):
    shuffled = csv_text("index,x,y", loss_rows()[::-1])
    table = Table.from_csv(*write(weights(0, "r0,0.504,0.500"), shuffled))
    assert table.run_ids == tuple(f"r{i}" for i in range(NUM_ROWS))
    assert table.domains == ("web", "code") and table.targets == ("x", "y")
    np.testing.assert_allclose(table.weights_RK[0], [0.504 / 1.004, 0.5 / 1.004])
    np.testing.assert_allclose(table.losses_RM[3], [3.03, 2.06])
    assert table.warnings == ()


def test_from_csv_byte_order_mark_quotes_and_windows_lines_are_read(write):
    text = csv_text('"id","web","code, all"', weight_rows()).replace("\n", "\r\n")
    table = Table.from_csv(*write(b"\xef\xbb\xbf" + text.encode(), ""))
    assert table.domains == ("web", "code, all") and len(table) == NUM_ROWS


def test_from_csv_ids_in_one_file_are_counted_and_missing_losses_masked(write):
    rows = replaced(loss_rows(), 2, "r2,,NA")
    text = csv_text("id,x,y", [*rows[:9], "other,1,1", "another,1,1"])
    weights_csv, losses_csv = write("", text)
    table = Table.from_csv(weights_csv, losses_csv)
    assert len(table) == 9
    assert (
        np.isnan(table.losses_RM[2]).all() and np.isfinite(np.delete(table.losses_RM, 2, 0)).all()
    )
    assert table.warnings == (
        f"1 ids are only in {weights_csv} and were left out",
        f"2 ids are only in {losses_csv} and were left out",
        "2 losses are missing and masked: x 1, y 1",
    )
    assert table.aligned_to(table).warnings == table.warnings  # said once, not once a copy


def test_aligned_to_reorders_columns_and_names_what_differs(write):
    table = Table.from_csv(*write())
    swapped = Table(
        run_ids=table.run_ids,
        domains=("code", "web"),
        targets=("y", "x"),
        weights_RK=table.weights_RK[:, ::-1],
        losses_RM=table.losses_RM[:, ::-1],
    )
    aligned = swapped.aligned_to(table)
    np.testing.assert_array_equal(aligned.weights_RK, table.weights_RK)
    np.testing.assert_array_equal(aligned.losses_RM, table.losses_RM)
    renamed = Table.from_csv(*write(weights(0, "r0,0.1,0.9", "id,web,math"), ""))
    with pytest.raises(FitError, match="other domains .* only in test: math; .*training: code"):
        renamed.aligned_to(table)
    retargeted = Table.from_csv(*write("", losses(0, "r0,1,2", "id,x,z")))
    with pytest.raises(FitError, match="other targets .* only in test: z; .*training: y"):
        retargeted.aligned_to(table)


def runs_frame(num_ok, num_failed):
    num = num_ok + num_failed
    web = np.linspace(0.1, 0.9, num)
    status = ["ok"] * num_ok + ["failed"] * num_failed
    return pd.DataFrame(
        {
            "run_id": [f"run{i}" for i in range(num)],
            "status": status,
            "weight/web": web,
            "weight/code": 1 - web,
            "loss/web": np.where(np.array(status) == "ok", 3 - web, np.nan),
            "loss/code": 2 + web,
        }
    )


def test_from_frame_uses_ok_rows_only_and_counts_the_rest():
    table = Table.from_frame(runs_frame(498, 14))
    assert len(table) == 498 and table.warnings == ("498 of 512 runs used; 14 failed",)
    assert table.domains == ("web", "code") and table.targets == ("web", "code")
    np.testing.assert_allclose(table.losses_RM[:, 0], 3 - table.weights_RK[:, 0])
    assert Table.from_frame(runs_frame(20, 0), targets=["code"]).targets == ("code",)


@pytest.mark.parametrize(
    ("frame", "targets", "words"),
    [
        (runs_frame(20, 0).drop(columns="status"), None, "no column 'status'"),
        (runs_frame(20, 0).drop(columns=["weight/web", "weight/code"]), None, "weight/<name>"),
        (runs_frame(20, 0), ["cod"], "no target 'cod'.*Did you mean 'code'"),
        (runs_frame(7, 30), None, "status 'ok' are 7 rows; expected at least 8"),
        (pd.concat([runs_frame(10, 0)] * 2), None, "run id 'run0' occurs 2 times"),
        (runs_frame(10, 0).assign(**{"weight/web": "a"}), None, "hold no numbers"),
        (runs_frame(10, 0).assign(**{"loss/web": np.nan}), None, "'web' has no loss in any of 10"),
    ],
)
def test_from_frame_bad_input_is_named(frame, targets, words):
    with pytest.raises(FitError, match=words):
        Table.from_frame(frame, targets)
