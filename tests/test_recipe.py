"The recipe of a pipeline: read from the transforms that act, the same in JSON, in an export and in a model file."
import json

import pandas as pd
import pytest
from fastai.data.all import ColReader, DataBlock, IndexSplitter
from fastai.learner import load_learner
from phantoms import CODES, python, write_case

from fastmed.core import InputError
from fastmed.data.blocks import SliceBlock, SliceMaskBlock, VolumeBlock, VolumeMaskBlock
from fastmed.data.loaders import SliceDataLoaders, VolumeDataLoaders
from fastmed.data.plan import Plan
from fastmed.data.preprocess import Preprocess
from fastmed.data.radiographs import RadiographDataLoaders, RadiographPrep
from fastmed.data.recipe import Labels, Recipe
from fastmed.data.transforms import PatchTransform
from fastmed.learn.ensemble import load_model
from fastmed.learn.fingerprint import data_words
from fastmed.learn.learner import unet3d_learner
from fastmed.learn.modelfile import save_model


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "A table of four phantoms"
    folder = tmp_path_factory.mktemp('recipe')
    rows = [dict(write_case(folder, f'p{i}', seed=i), kind='ab'[i % 2], age=40.+i) for i in range(4)]
    return pd.DataFrame(rows), folder


def loaders(cases, cls=VolumeDataLoaders, **kwargs):
    df, folder = cases
    return cls.from_df(df, path=folder, cache=folder/'store', device='cpu', num_workers=0, bs=2,
                       valid_pct=.5, **kwargs)


def patches(cases, cls=VolumeDataLoaders, **kwargs):
    return loaders(cases, cls, codes=CODES, patch=16, samples_per_case=1, **kwargs)


def loading(dls): return dls.train_ds.tls[0].tfms.fs[-1]


def test_what_from_df_decided_is_one_object(cases):
    dls = patches(cases)
    r = dls.recipe
    assert r.plan is dls.plan and r.preprocess is dls.preprocess and r.labels is None
    assert r.structures == CODES and r.columns == dict(image='image', mask='mask')
    assert all(o in repr(r) for o in ('image', 'background, large, small', 'Preprocess', 'patch'))


@pytest.mark.parametrize('col,task,names', [('kind', 'category', ['a', 'b']), ('age', 'regression', ['age'])])
def test_labels_and_their_columns(cases, col, task, names):
    r = loaders(cases, label_col=col, size=16).recipe
    assert r.labels == Labels(task, names) and r.columns['label'] == col and r.plan.whole
    assert Recipe.from_json(r.to_json()) == r


@pytest.mark.parametrize('cls', [VolumeDataLoaders, SliceDataLoaders])
def test_json_both_ways(cases, cls):
    r = patches(cases, cls).recipe
    again = Recipe.from_json(json.dumps(json.loads(r.to_json())))
    assert again == r and again.plan.reasons == r.plan.reasons and again.to_json() == r.to_json()


@pytest.mark.parametrize('text', ['', '[]', '{}', 'null', '{"preprocess": {"kind": "Other"}}',
                                  '{"preprocess": 1, "plan": null, "labels": null, "columns": {}, '
                                  '"label_delim": null}'])
def test_text_that_is_no_recipe_is_refused(text):
    with pytest.raises(InputError): Recipe.from_json(text)


def test_plain_blocks_have_one_too(cases):
    df, folder = cases
    df = df.assign(image=str(folder)+'/'+df.image, mask=str(folder)+'/'+df['mask'])
    kinds = (VolumeBlock, VolumeMaskBlock, (16, 16, 16)), (SliceBlock, SliceMaskBlock, (1, 16, 16))
    for of_image, of_mask, size in kinds:
        block = DataBlock(blocks=(of_image, of_mask(CODES)), get_x=ColReader('image'), get_y=ColReader('mask'),
                          splitter=IndexSplitter([2, 3]), item_tfms=PatchTransform(size))
        for dls in (block.dataloaders(df, bs=2), block.weighted_dataloaders(df, [1, 2, 1, 1], bs=2, num_workers=0)):
            assert dls.recipe.structures == CODES and dls.plan.patch == size and dls.recipe.columns == {}


def test_what_is_not_there_is_said(cases):
    df, folder = cases
    block = DataBlock(blocks=VolumeBlock, get_x=lambda r: str(folder/r['image']), splitter=IndexSplitter([2, 3]))
    dls = block.dataloaders(df, bs=1)
    assert dls.recipe.plan is None and dls.recipe.structures is None
    with pytest.raises(InputError, match='cut no patches'): print(dls.plan)
    with pytest.raises(InputError, match='no VolumeBlock'): print(DataBlock().dataloaders([1, 2, 3], bs=1).recipe)


def test_it_follows_what_is_put_in_the_place_of_a_transform(cases):
    dls = patches(cases)
    was = dls.recipe
    dls.train.after_item.fs[0].plan = Plan({**dls.plan, 'patch': (8, 8, 8)})
    loading(dls).store = None
    loading(dls).preprocess = Preprocess((2, 2, 2), codes=CODES)
    assert dls.plan.patch == (8, 8, 8) and dls.preprocess.spacing == (2., 2., 2.) and dls.recipe != was
    assert dls.recipe.preprocess is loading(dls).preprocess


def test_it_names_the_preprocess_of_the_store_which_acts(cases):
    dls = patches(cases)
    acting = dls.preprocess
    x = dls.train_ds[0][0]
    loading(dls).preprocess = Preprocess((2, 2, 2), codes=CODES)
    assert dls.train_ds[0][0].shape == x.shape and dls.recipe.preprocess is acting


def test_learner_export_and_model_file_carry_it(cases, tmp_path):
    dls = patches(cases)
    learn = unet3d_learner(dls, nf=4, depth=2, path=tmp_path)
    learn.export(tmp_path/'learn.pkl')
    save_model(learn, tmp_path/'learn.safetensors')
    opened = load_learner(tmp_path/'learn.pkl'), load_model(tmp_path/'learn.safetensors', 'cpu')
    for o in opened:
        assert o.dls.recipe == dls.recipe and o.dls.plan.reasons == dls.plan.reasons
    script = "import sys\nfrom fastmed.all import *\n" \
             "print(load_learner(sys.argv[2]).dls.recipe.to_json()+'\\n'+load_model(sys.argv[3]).dls.recipe.to_json())"
    out = python(script, str(tmp_path), str(tmp_path/'learn.pkl'), str(tmp_path/'learn.safetensors'))
    assert all(Recipe.from_json(o) == dls.recipe for o in out.strip().splitlines()[-2:])


def test_two_pipelines_side_by_side(cases):
    a = patches(cases, spacing=1.)
    text = a.recipe.to_json()
    b = patches(cases, SliceDataLoaders, spacing=2., normalize='minmax')
    assert a.recipe.to_json() == text and a.recipe != b.recipe
    learn = unet3d_learner(a, nf=4, depth=2)
    learn.dls = patches(cases, spacing=1.5)
    assert learn.dls.preprocess.spacing == (1.5,)*3 and a.preprocess.spacing == (1.,)*3


def test_radiographs(tmp_path):
    np = pytest.importorskip('numpy')
    image = pytest.importorskip('PIL.Image')
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 20)).astype('uint8')
        image.fromarray(pixels).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(image=[f'{i}.png' for i in range(6)], label=['a', 'b']*3))
    dls = RadiographDataLoaders.from_df(df, tmp_path, size=16, bs=2, cache=tmp_path/'c', device='cpu', valid_pct=.34)
    r = dls.recipe
    assert r.preprocess == RadiographPrep(16) and r.preprocess is dls.prep and r.plan is None
    assert r.labels == ('category', ['a', 'b']) and Recipe.from_json(r.to_json()) == r
    # a fit that goes on at another size is refused by it
    assert data_words(dls)['preprocessing, size'] == '16'


def test_headers_are_read_once(cases, monkeypatch, tmp_path):
    "Of each file, however many steps ask"
    from fastmed.data import loaders as module
    from fastmed.data import plan, preprocess, recipe
    df, folder = cases
    seen = []
    read = module.read_header

    def counted(fn):
        seen.append(str(fn))
        return read(fn)
    for m in (module, plan, preprocess, recipe): monkeypatch.setattr(m, 'read_header', counted)
    VolumeDataLoaders.from_df(df, path=folder, cache=tmp_path/'new', device='cpu', codes=CODES, bs=2, valid_pct=.5)
    assert len(seen) == 8 and len(set(seen)) == 8
