"""A small shop to try things with: pictures in folders by category, and a table as a spreadsheet exports it (GB18030).

Example: python examples/draw_shop.py shop
"""

import argparse
import csv
from pathlib import Path
from random import Random

from data_tools.scenes import captions, draw, sample_scenes

CATEGORIES = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "white": "白色", "black": "黑色",
}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--goods", type=int, default=900, help="[default: %(default)s]")
chosen = parser.parse_args()

random = Random(0)
chosen.folder.mkdir(parents=True)
with open(chosen.folder / "商品.csv", "w", encoding="gb18030", newline="") as file:
    table = csv.writer(file)
    table.writerow(["商品编号", "主图", "商品标题", "英文标题", "类目", "价格"])
    alone = [scene for scene in sample_scenes(12 * chosen.goods, seed=7) if scene.second is None]
    for number, scene in enumerate(alone[: chosen.goods], start=1):
        category = CATEGORIES[scene.first.colour]
        picture = Path(category) / f"商品{number:04d}.jpg"
        (chosen.folder / category).mkdir(exist_ok=True)
        draw(scene, 160).save(chosen.folder / picture, quality=90)
        titles = dict(reversed(captions(scene)))  # the first of each language
        price = f"{random.randrange(900, 9900) / 100:.2f}"
        table.writerow([f"A{number:04d}", picture.as_posix(), titles["zh"], titles["en"], category, price])
print(f"{chosen.goods} goods in {chosen.folder}: 商品.csv, and pictures in a folder for each category")
with open(chosen.folder / "商品.csv", encoding="gb18030", newline="") as file:
    for row, _ in zip(csv.DictReader(file), range(3), strict=False):
        print(f"  {row['商品编号']}  {row['主图']}  {row['商品标题']}  {row['价格']}")
