"""The pairs table: what belongs together, and every way to get it wrong in one line with the row's number."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.pairs_table import read_pairs
from errors import InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz", "c.nii", "d.b2nd", "sub/a.nii.gz"):
        (tmp_path / "ct" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ct" / name).touch()
    (tmp_path / "xray").mkdir()
    for name in ("a1.png", "a2.dcm", "b1.jpg"):
        (tmp_path / "xray" / name).touch()
    (tmp_path / "a.txt").write_text("Filling defect in the left lower lobe.\nNo strain.\n", encoding="utf-8")
    return tmp_path


def table(folder, *lines: str, header: str = "patient,ct,xray,label,report,split"):
    path = folder / "pairs.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_everything_that_a_row_can_say(folder):
    path = table(
        folder,
        "p1,ct/a.nii.gz,xray/a1.png;xray/a2.dcm,yes,a.txt,train",
        'p2,ct/b.nii.gz,xray/b1.jpg,Negative,"No embolism, heart normal.",VAL',
        ",,,,,",
        "p3,ct/c.nii,,,,Test",
    )
    first, second, third = read_pairs(path)
    assert (first.name, first.patient, first.ct) == ("p1_a", "p1", folder / "ct" / "a.nii.gz")
    assert first.xrays == (folder / "xray" / "a1.png", folder / "xray" / "a2.dcm")
    assert first.report == "Filling defect in the left lower lobe.\nNo strain."
    assert (first.label, first.split, first.needs_drr) == (True, "train", False)
    assert (second.label, second.report, second.split) == (False, "No embolism, heart normal.", "validation")
    assert (third.label, third.report, third.split, third.needs_drr) == (None, None, "test", True)


def test_columns_in_any_order_and_only_those_needed(folder):
    (case,) = read_pairs(table(folder, f"{folder}/ct/d.b2nd,d", header="\ufeffct,patient"))
    assert (case.name, case.xrays, case.label, case.split) == ("d", (), None, None)


def test_several_xrays_by_repeated_rows(folder):
    (case,) = read_pairs(
        table(folder, "p1,ct/a.nii.gz,xray/a1.png,yes,,train", "p1,ct/../ct/a.nii.gz,xray/a2.dcm,,text,")
    )
    assert [path.name for path in case.xrays] == ["a1.png", "a2.dcm"]
    assert (case.label, case.report, case.split) == (True, "text", "train")


WITH_LATERAL = "patient,ct,xray,lateral"


def test_lateral_views_have_a_column(folder):
    (case,) = read_pairs(table(folder, "p1,ct/a.nii.gz,xray/a1.png,xray/a2.dcm", header=WITH_LATERAL))
    assert [[path.name for path in paths] for paths in (case.xrays, case.laterals)] == [["a1.png"], ["a2.dcm"]]
    assert "names an X-ray twice" in refused(
        table(folder, "p1,ct/a.nii.gz,xray/a1.png,xray/a1.png", header=WITH_LATERAL)
    )
    assert "row 2: a lateral view and no frontal one" in refused(
        table(folder, "p1,ct/a.nii.gz,,xray/a2.dcm", header=WITH_LATERAL)
    )
    rows = "p1,ct/a.nii.gz,xray/a1.png,xray/a2.dcm", "p2,ct/b.nii.gz,xray/b1.jpg,xray/a2.dcm"
    assert "belongs to patient p1" in refused(table(folder, *rows, header=WITH_LATERAL))


def test_one_patient_may_have_several_examinations_with_their_own_labels(folder):
    cases = read_pairs(table(folder, "p1,ct/a.nii.gz,,yes,,train", "p1,ct/b.nii.gz,,no,,train"))
    assert [(case.name, case.label) for case in cases] == [("p1_a", True), ("p1_b", False)]


def test_equal_file_names_get_names_of_their_own_that_do_not_change(folder):
    lines = "p1,ct/a.nii.gz,,,,", "p1,ct/sub/a.nii.gz,,,,"
    names = [case.name for case in read_pairs(table(folder, *lines))]
    assert len(set(names)) == 2
    assert all(name.startswith("p1_a-") for name in names)
    assert [case.name for case in read_pairs(table(folder, *lines, "p2,ct/b.nii.gz,,,,"))][:2] == names


def test_t40_a_hostile_patient_leaves_no_folder(folder):
    (case,) = read_pairs(table(folder, "../../etc/x y\u202e,ct/a.nii.gz,,,,"))
    assert "/" not in case.name
    assert not case.name.startswith(".")
    assert case.name.isascii()


@pytest.mark.parametrize(
    ("lines", "row", "words"),
    [
        (["p1,ct/no.nii.gz,,,,"], 2, ["no.nii.gz", "missing"]),
        (["p1,ct/a.nii.gz,xray/no.png,,,"], 2, ["no.png", "missing"]),
        (["p1,ct/a.nii.gz,,,no.txt,"], 2, ["no.txt", "missing"]),
        (["p1,xray/a1.png,,,,"], 2, ["a1.png", ".nii"]),
        (["p1,,,,,"], 2, ["ct cell is empty"]),
        ([",ct/a.nii.gz,,,,"], 2, ["patient cell is empty"]),
        (["p1,ct/a.nii.gz,,,,", "p1,ct/a.nii.gz,,,,"], 3, ["repeats row 2"]),
        (["p1,ct/a.nii.gz,xray/a1.png,,,", "", "p1,ct/a.nii.gz,xray/a1.png,,,"], 4, ["repeats", "a1.png"]),
        (["p1,ct/a.nii.gz,xray/a1.png;xray/a1.png,,,"], 2, ["twice"]),
        (["p1,ct/a.nii.gz,xray/a1.png,yes,,", "p1,ct/a.nii.gz,xray/a2.dcm,no,,"], 3, ["label contradicts row 2"]),
        (["p1,ct/a.nii.gz,xray/a1.png,,x,", "p1,ct/a.nii.gz,xray/a2.dcm,,y,"], 3, ["report contradicts row 2"]),
        (["p1,ct/a.nii.gz,,,,", "p2,ct/a.nii.gz,xray/a1.png,,,"], 3, ["p1", "row 2", "p2"]),
        (["p1,ct/a.nii.gz,xray/a1.png,,,", "p2,ct/b.nii.gz,xray/a1.png,,,"], 3, ["a1.png", "p1", "p2"]),
        (["p1,ct/a.nii.gz,,perhaps,,"], 2, ["'perhaps'", "yes, no"]),
        (["p1,ct/a.nii.gz,,,,dev"], 2, ["'dev'", "train, validation and test"]),
        (["p1,ct/a.nii.gz,,,,train", "p1,ct/b.nii.gz,,,,test"], 3, ["patient p1", "train", "test", "row 2"]),
        (["p1,ct/a.nii.gz,,,,train", "p2,ct/b.nii.gz,,,,"], 3, ["split cell is empty"]),
        (["p1,ct/a.nii.gz"], 2, ["2 cells under 6 columns"]),
        (["p1,ct/a.nii.gz,,,one, two,train"], 2, ["7 cells", "quotation marks"]),
        ([f"p1,{'x' * 5000}.nii,,,,"], 2, ["missing"]),
    ],
)
def test_bad_rows_are_refused_with_their_number(folder, lines, row, words):
    message = refused(table(folder, *lines))
    for word in (f"row {row}:", *words):
        assert word in message, message


def test_all_bad_rows_are_logged_and_the_first_is_raised(folder, caplog):
    path = table(folder, "p1,ct/no.nii.gz,,,,", "p2,ct/a.nii.gz,,perhaps,,", "p3,ct/b.nii.gz,,,,dev")
    with caplog.at_level(logging.ERROR):
        message = refused(path)
    assert "row 2:" in message
    assert "2 more rows" in message
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["row 2", "row 3", "row 4"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["patient, ct is missing"]),
        (b"patient,ct,xray\n", ["holds no row"]),
        (b"patient,ct,age,sex\n", ["unknown column age, sex", "columns are patient, ct"]),
        (b"patient,ct,\np1,x,\n", ["unknown column (empty)"]),
        (b"patient,xray\n", ["column ct is missing"]),
        (b"patient;ct;xray\n", ["missing", "parted by commas"]),
        (b"patient,ct,ct\n", ["occurs twice"]),
        (b"patient,ct\np\xff1,x\n", ["UTF-8"]),
        (b'patient,ct\n"p1,x\n', ["no CSV"]),
    ],
)
def test_bad_tables_are_refused(tmp_path, content, words):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    message = refused(path)
    for word in words:
        assert word in message, message


def test_a_table_that_is_not_there(tmp_path):
    assert "No such file" in refused(tmp_path / "none.csv")
    assert "directory" in refused(tmp_path)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300), st.booleans())
def test_t44_garbage_finds_only_input_errors(tmp_path_factory, content, with_header):
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes((b"patient,ct,xray,label,report,split\n" if with_header else b"") + content)
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value)
