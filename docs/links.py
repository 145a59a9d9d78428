"""What pages link to outside of `docs`: pictures join the site, all else is the repository's."""

import re
from pathlib import Path

from mkdocs.structure.files import File

PICTURE = re.compile(r"(!\[[^\]]*\]\()\.\./([^)]+)\)")
OUT = re.compile(r"\]\(\.\./([^)]+)\)")


def on_files(files, config):
    for page in files.documentation_pages():
        for _, picture in PICTURE.findall(Path(page.abs_src_path).read_text()):
            source = Path(config.docs_dir).parent / picture
            place = f"figures/{source.name}"
            if place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, config, **kwargs) -> str:
    home = config.repo_url.rstrip("/")
    markdown = PICTURE.sub(lambda m: f"{m[1]}figures/{Path(m[2]).name})", markdown)
    return OUT.sub(lambda m: f"]({home}/blob/main/{m[1]})", markdown)
