"README.md from nbs/index.ipynb: nbdev's own processors, then nbconvert's Markdown exporter. `--check` only compares."
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path


def render(
    root:Path, # Folder of the project
)->str:        # Markdown of README.md
    "What README.md must hold."
    import nbformat
    import yaml
    from fastcore.nbio import read_nb, write_nb
    from nbconvert import MarkdownExporter
    from nbdev.processors import FilterDefaults, add_links
    class Procs(FilterDefaults): # links into a site would depend on what is installed
        def base_procs(self): return [o for o in super().base_procs() if o is not add_links]
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        nb,fn = read_nb(root/'nbs'/'index.ipynb'),Path(tmp)/'index.ipynb'
        Procs()(nb)
        write_nb(nb, fn)
        d = json.loads(fn.read_text(encoding='utf-8'))
    d.pop('has_sd', None) # neither key is known to nbformat
    for c in d['cells']: c['metadata'].pop('execution', None)
    # nbdev made title and quote its front matter
    head = yaml.safe_load(''.join(d['cells'].pop(0)['source']).strip().strip('-'))
    nb = nbformat.reads(json.dumps(d), as_version=4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {head['title']}\n\n> {head['description']}"))
    nb.metadata['language_info'] = {'name':'python'}
    md,res = MarkdownExporter().from_notebook_node(nb)
    if res.get('outputs'):
        raise ValueError(f"README.md must stand alone, but nbs/index.ipynb has picture outputs: "
                         f"{sorted(res['outputs'])}. Clear them, or link a file.")
    md = re.sub(r'^#\| .*\n', '', md, flags=re.M)
    md = re.sub(r'[ \t]+$', '', md, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'

if __name__ == '__main__':
    root = Path(__file__).resolve().parent.parent
    md,fn = render(root),root/'README.md'
    if '--check' in sys.argv:
        sys.exit(0 if fn.exists() and fn.read_text(encoding='utf-8')==md
                 else 'README.md is not what nbs/index.ipynb says: run `make docs`')
    fn.write_text(md, encoding='utf-8')
