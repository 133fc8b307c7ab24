"""The picture of a page, `docs/images/page.png`: two small networks on digits that share two of three stages.

    python benchmarks/page_image.py

Needs Chromium with its driver, selenium, and scikit-learn; about a minute.
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

import fxzip
from fxzip.tools.demo import load_digits_split, train

PLACE = Path(__file__).parent.parent / "docs" / "images" / "page.png"
SIZE = 1180, 1490
TASKS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def zipped():
    """A zip of two networks that share half of their FLOPs."""
    digits = load_digits_split()
    names = ["digits 0 to 4", "digits 5 to 9"]
    models = {
        name: train((digits.train_images, digits.train_labels), task, seed=seed, progress=False)
        for seed, (name, task) in enumerate(zip(names, TASKS, strict=True))
    }
    return fxzip.compile_zip(models, digits.train_images[:64], data=[digits.train_images], until="layer2")


def draw(page, picture):
    """Open a page in a browser without a window, and store what is seen."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE[0]},{SIZE[1] + 143}"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(page.as_uri())
        browser.execute_script(
            "const own = fxzip.data.nodes.findIndex((node) => node.path === 'layer1.conv1');"
            "fxzip.reveal(own); fxzip.cy.fit(undefined, 12);"
        )
        picture.parent.mkdir(exist_ok=True)
        seen = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        seen.quantize(255, Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)
    finally:
        browser.quit()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        zipped().report.html(page)
        draw(page, PLACE)
    print(PLACE)
