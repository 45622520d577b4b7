# SPDX-License-Identifier: Apache-2.0
"""The table of call sites, against the installed megatron-core and damaged copies of it."""

import shutil
import sys

import pytest

from megatron_sp_fix import UnsupportedMegatronError, sites

ROOT = sites.installed_root()
RELEASE = sites.version(ROOT)
FOUND = {row.role: row for row in sites.supported(ROOT)[0]}


def path(root, module):
    return root / (module.replace(".", "/") + ".py")


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that the table reads."""
    for module in {site.module for site in sites.SITES} | {"megatron.core.package_info"}:
        if path(ROOT, module).is_file():
            path(tmp_path, module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path(ROOT, module), path(tmp_path, module))
    return tmp_path


def set_version(tree, release):
    text = "MAJOR = {}\nMINOR = {}\nPATCH = {}\n".format(*release.split("."))
    path(tree, "megatron.core.package_info").write_text(text)


def edit(tree, role, old, new):
    """Replace text in the file of a call site."""
    file = path(tree, FOUND[role].module)
    before = file.read_text()
    assert old in before
    file.write_text(before.replace(old, new))
    return file


def test_the_installed_release_is_recognized():
    assert list(FOUND)[:3] == ["GPT decoder", "hybrid decoder", "MTP"]
    assert ("hand on" in FOUND) == (RELEASE >= (0, 14))
    assert ("MTP single step" in FOUND) == (RELEASE >= (0, 17))
    for role, site in FOUND.items():
        expected = "own scatter" if role == "GPT decoder" and RELEASE >= (0, 19) else "no shard"
        assert site.native == expected or RELEASE >= (0, 19), site
        needed = "decoder_input" if site.embeds == "self.embedding" else "embedding"
        assert needed in site.parameters and "self" not in site.parameters
    assert sites.supported(ROOT)[1] == ""


def test_nothing_is_run_or_imported(tree):
    for role in FOUND:
        file = path(tree, FOUND[role].module)
        file.write_text(file.read_text() + "\nraise SystemExit('run')\n")
    before = set(sys.modules)
    assert [row.role for row in sites.supported(tree)[0]] == list(FOUND)
    assert set(sys.modules) == before


@pytest.mark.parametrize("role", ["GPT decoder", "hybrid decoder", "MTP"])
def test_a_site_that_is_not_recognized_is_named(tree, role):
    """A fork embeds by another call: the error names the file, the methods and what to do."""
    called = FOUND[role].embeds
    edit(tree, role, f"{called}(input_ids=", f"{called}(ids=")
    site = FOUND[role]
    with pytest.raises(UnsupportedMegatronError, match=rf"{site.module}: {site.name}") as error:
        sites.supported(tree)
    text = str(error.value)
    assert "\n" not in text and str(tree) in text and "sites.py" in text and called in text


@pytest.mark.parametrize("damage", ["class", "method", "file"])
def test_a_site_that_is_gone_is_named(tree, damage):
    site = FOUND["GPT decoder"]
    if damage == "file":
        path(tree, site.module).unlink()
    elif damage == "class":
        edit(tree, "GPT decoder", f"class {site.cls}(", "class Renamed(")
    else:
        edit(tree, "GPT decoder", f"def {site.method}(", "def renamed(")
    with pytest.raises(UnsupportedMegatronError, match=rf"{site.module}: {site.cls}\.\w+"):
        sites.supported(tree)


def test_a_role_that_a_release_lacks_may_be_missing(tree):
    if "hand on" not in FOUND:
        pytest.skip("this release lacks it already")
    site = FOUND["hand on"]
    file = path(tree, site.module)
    text = file.read_text()
    at = text.index(f"class {site.cls}(")
    file.write_text(text[:at] + text[at:].replace(f"def {site.method}(", "def renamed(", 1))
    expected = [role for role in FOUND if role != "hand on"]
    assert [row.role for row in sites.supported(tree)[0]] == expected


@pytest.mark.parametrize("data", [b"def (:\n", b"x = '\xff'\n", b"x = 'a\x00b'\n"])
def test_a_file_that_cannot_be_read_is_named_in_one_line(tree, data):
    file = path(tree, FOUND["GPT decoder"].module)
    file.write_bytes(data)
    with pytest.raises(UnsupportedMegatronError, match="cannot be read by this Python") as error:
        sites.supported(tree)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_tree_that_was_patched_in_its_source(tree):
    """It calls the function that `diff` adds, whatever else it does."""
    called = "self.embedding(input_ids="
    edit(tree, "GPT decoder", called, "scatter_embeddings(self.embedding, input_ids=")
    if FOUND["GPT decoder"].native == "own scatter":  # half patched: it scatters, too
        with pytest.raises(UnsupportedMegatronError, match="found 0"):
            sites.supported(tree)
        edit(tree, "GPT decoder", "self.embedding.scatter_to_sequence_parallel", "True")
    assert sites.supported(tree)[0][0].native == "this fix"


def test_a_tree_that_goes_while_a_process_has_it(tree):
    known = sites.supported(tree)
    shutil.rmtree(tree)
    assert sites.supported(tree) == known


def test_no_tree(tmp_path):
    with pytest.raises(UnsupportedMegatronError, match=f"no megatron-core at {tmp_path}"):
        sites.version(tmp_path)


def test_no_version(tree):
    path(tree, "megatron.core.package_info").write_text("")
    with pytest.raises(UnsupportedMegatronError, match="states no version"):
        sites.supported(tree)


@pytest.mark.parametrize("release", ["0.11.0", "0.12.0", "0.19.2", "0.20.0"])
def test_supported_range(tree, release):
    set_version(tree, release)
    if release == "0.11.0":
        with pytest.raises(UnsupportedMegatronError, match=r"0\.11\.0 at .* 0\.12 to 0\.19"):
            sites.supported(tree)
        return
    found, remark, _ = sites.supported(tree)
    assert len(found) == len(FOUND)
    assert ("0.20.0" in remark and "newer than 0.19" in remark) == (release == "0.20.0")
    assert remark or release != "0.20.0"


def test_not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UnsupportedMegatronError, match="pip install megatron-core"):
        sites.installed_root()
