"""The report in a real headless Chromium without a network: sliders, windows, orientation, narrow and dark."""

import numpy as np
import pytest

from evaluation import report_sections
from evaluation.report_collect import collect
from tests.evaluation.browser import NO_WEBGL, PROGRAM, WEBGL, Browser
from tests.evaluation.report_material import lopsided, write_codec_metrics, write_generation, write_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH")]
READY = "document.querySelector('#viewer').dataset.state"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of one run with two patients, one of them with a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "codec")
    write_run(folder / "ddpm", "diffusion")
    write_codec_metrics(folder / "codec" / "sample_reconstructions")
    write_generation(folder / "evaluation")
    cases = [lopsided("case_1"), lopsided("<img src=x onerror=document.title=1>")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_sections, "cases_of", lambda *_: iter(cases))
        html = report_sections.write_report(collect([folder]), 2, "cpu")
    path = folder / "report.html"
    path.write_text(html)
    return path


def quadrants(picture):
    """Coronal, sagittal and axial plane of a pane; the fourth quadrant is 3D or empty."""
    rows, columns = picture.shape[0] // 2, picture.shape[1] // 2
    return picture[:rows, :columns], picture[:rows, columns:], picture[rows:, :columns]


def offset_of_bright(plane):
    """(down, right) of the bright block from the middle of the body, in pixels; crosshair and letters are yellow."""
    level = plane.astype(int)
    grey = np.ptp(level, axis=2) < 12
    bright, body = (np.argwhere(grey & (level[..., 0] > threshold)).mean(0) for threshold in (150, 40))
    return bright - body


def changed(before, after):
    """Share of pixels that differ."""
    return float((np.abs(before.astype(int) - after.astype(int)).max(axis=2) > 20).mean())


@pytest.mark.parametrize(("flags", "state"), [(WEBGL, "niivue"), (NO_WEBGL, "plain")])
def test_viewer_slides_windows_and_is_the_right_way_round(report, tmp_path, flags, state):
    with Browser(tmp_path / "profile", flags) as browser:
        browser.open(report)
        browser.wait(READY)
        note = browser.evaluate("document.querySelector('#viewer-note').textContent")
        assert browser.evaluate(READY) == state, f"{note} {browser.messages()}"
        browser.click("#presets button:nth-child(3)")  # PE: -250 to 450 HU
        start = browser.screenshot("#pane-truth")
        coronal, sagittal, axial = map(offset_of_bright, quadrants(start))
        assert coronal[0] < -5  # superior is up
        assert coronal[1] > 5  # the patient's left is on the right
        assert sagittal[0] < -5
        assert sagittal[1] < -5  # anterior is on the left
        assert axial[0] < -5  # anterior is up
        assert axial[1] > 5

        # a hand drags the axial slider to the bottom, below the block: it leaves the axial plane
        browser.drag("#place-d", 0.5, 0.06)
        assert browser.evaluate("Number(document.querySelector('#place-d').value)") < 6
        assert browser.evaluate("document.querySelector('#shown-d').textContent").endswith(" / 40")
        moved = browser.screenshot("#pane-truth")
        before, after = (quadrants(picture)[2] for picture in (start, moved))
        assert changed(before, after) > 0.02
        assert (after.min(axis=2) > 150).sum() < 0.1 * (before.min(axis=2) > 150).sum()
        assert changed(start, browser.screenshot("#pane-other")) > 0.02  # the other side follows

        # a click in the coronal plane, superior left of the patient, brings the axial slice into the block again
        browser.click("#pane-truth", 0.34, 0.16)
        place = browser.evaluate("['d', 'h', 'w'].map((a) => Number(document.querySelector('#place-' + a).value))")
        assert place[0] > 22
        assert place[1] == 20
        assert place[2] > 22

        pe = browser.screenshot("#pane-truth")
        browser.click("#presets button:nth-child(2)")  # lung: water is nearly white
        assert changed(pe, browser.screenshot("#pane-truth")) > 0.2
        assert browser.evaluate("document.querySelector('#presets button:nth-child(2)').ariaPressed") == "true"
        generated = browser.screenshot("#pane-other")
        browser.evaluate(
            "(() => { const s = document.querySelector('#other');"
            " s.value = 1; s.dispatchEvent(new Event('change')); })()"
        )
        browser.wait("document.querySelector('#other').selectedOptions[0].text.includes('codec')")
        for _ in range(20):
            if changed(generated, browser.screenshot("#pane-other")) > 0.02:
                break
        else:
            pytest.fail("another volume changes nothing")
        if state == "niivue":
            planes = browser.screenshot("#pane-truth")
            browser.click("#solid")
            assert changed(planes, browser.screenshot("#pane-truth")) > 0.1

        assert browser.evaluate("document.title") == "From one chest X-ray to a CT volume"
        assert {request.split(":", 1)[0] for request in browser.requests()} <= {"file", "data", "blob"}
        assert [request for request in browser.requests() if request.startswith("file")] == [report.as_uri()]
        assert browser.messages() == []


def test_page_fits_a_phone_and_a_dark_desk(report, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        backs = []
        for width, dark in ((1280, False), (400, True)):
            browser.open(report, width=width, dark=dark)
            browser.wait(READY)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            backs.append(float(browser.screenshot("header").mean()))
            # text of charts and tables is no smaller than 10 px on the screen
            smallest = browser.evaluate(
                "Math.min(...[...document.querySelectorAll('.chart')].map((c) => 12 * c.clientWidth / 380))"
            )
            assert smallest >= 10
        assert backs[0] > 200
        assert backs[1] < 80
        # the planes of each patient are shown in one window at a time, and the choice needs no script
        assert browser.evaluate("[...document.querySelectorAll('.panels')].filter((p) => p.clientHeight).length") == 2
        browser.evaluate("document.querySelector('#case0w1').click()")
        assert browser.evaluate("document.querySelector('.panels.p1').clientHeight") > 100
        assert browser.evaluate("document.querySelector('.panels.p0').clientHeight") == 0


def test_t39_the_policy_stops_a_script_that_got_in_and_every_connection(report, tmp_path):
    page = tmp_path / "page.html"
    intruder = "<script>document.title = 'intruded'</script><img src=x onerror=\"document.title = 'intruded'\">"
    page.write_text(report.read_text().replace("</header>", f"{intruder}</header>", 1))
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait(READY)
        assert browser.evaluate("document.title") == "From one chest X-ray to a CT volume"
        refused = browser.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => 'refused')")
        assert refused == "refused"
        assert any("Content Security Policy" in message for message in browser.messages())
