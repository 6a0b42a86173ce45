"""The documents as a site: all pages are there, and their links lead somewhere, without mkdocs being installed."""
import os
import pytest
import re
import yaml

from tests.helpers import ROOT

CONFIG = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
FOLDER = ROOT / CONFIG['docs_dir']


def pages_of(nav):
    """The pages of a part of the navigation, those of its sections too."""
    values = [value for entry in nav for value in entry.values()]
    return [page for value in values for page in (pages_of(value) if isinstance(value, list) else [value])]


PAGES = pages_of(CONFIG['nav'])


def prose(text):
    """A page without its code, in which brackets are no links and # begins no heading."""
    return re.sub(r'`[^`\n]*`', '', re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S))


def anchors(text):
    """What the headings of a page are called in links, by Python-Markdown as by GitHub, for what our headings hold."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S), re.M)
    return {re.sub(r'\s+', '-', re.sub(r'[^\w\s-]', '', heading).strip().lower()) for heading in headings}


def test_the_site_has_all_documents():
    assert set(PAGES) >= {str(path.relative_to(ROOT))
                          for path in (ROOT / 'docs').rglob('*.md')} | {'README.md', 'CHANGELOG.md'}
    assert [path for path in PAGES if not (FOLDER / path).is_file()] == []


@pytest.mark.parametrize('page', PAGES)
def test_links_of_a_page_lead_to_what_the_site_has(page):
    broken = []
    for link in re.findall(r'\]\(([^)\s]+)\)', prose((FOLDER / page).read_text())):
        if re.match('[a-z]+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        if target.startswith('..') or not (FOLDER / target).exists():
            broken.append(link)
        elif anchor and anchor not in anchors((FOLDER / target).read_text()):
            broken.append(link)
    assert broken == []
