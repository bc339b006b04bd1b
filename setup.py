"Packaging: what pyproject.toml calls dynamic is read from settings.ini, README.md or (version) fastmed/__init__.py."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
licenses = {'apache2': 'Apache-2.0'}
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
lower,upper = int(cfg['min_python'].split('.')[1]), 13

setup(
    description=cfg['description'], keywords=cfg['keywords'].split(), author=cfg['author'],
    license=licenses[cfg['license']],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name']+'.*']), include_package_data=True, zip_safe=False,
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=[
        'Development Status :: 4 - Beta', 'Intended Audience :: Science/Research',
        'Intended Audience :: Healthcare Industry', 'Topic :: Scientific/Engineering :: Medical Science Apps.',
        'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: 3.{v}' for v in range(lower, upper+1))],
)
