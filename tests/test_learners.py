"Learners and DataLoaders that a fastai user builds by hand: what fastai offers works, or is refused by name before training."
import pickle, warnings
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.data import WeightedDL
from fastai.callback.schedule import lr_find
from fastai.data.all import DataBlock, Datasets, IndexSplitter, TfmdDL
from fastai.learner import Callback, load_learner
from fastmed.blocks import CaseFiles, PatchDL, PatchTransform, VolumeBlock, VolumeMaskBlock
from fastmed.core import InputError
from fastmed.data import VolumeDataLoaders
from fastmed.doctor import GroupSplitter
from fastmed.learner import unet3d_learner
from fastmed.models import create_model, model_names, param_splitter
from phantoms import CODES, write_case

@pytest.fixture
def cases(tmp_path):
    "Six phantoms of three subjects: (folder, DataFrame)"
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(6)])
    return tmp_path, df.assign(subject=[f's{i//2}' for i in range(6)], label=['a','b']*3)

def mask_block(path, splitter=None, patch=(8,8,8)):
    return DataBlock((VolumeBlock, VolumeMaskBlock(CODES)), get_x=CaseFiles('image', path), get_y=CaseFiles('mask', path),
                     splitter=splitter or IndexSplitter([4,5]), item_tfms=PatchTransform(patch))

def warned(f, word):
    "What `f` gives, and its warnings that hold a word"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f()
    return res,[str(o.message) for o in w if word in str(o.message)]

# Weighted and partial DataLoaders

def check_patches(dls, n):
    "What every DataLoader of patches keeps"
    assert isinstance(dls.train, PatchDL) and isinstance(dls.valid, PatchDL)
    assert dls.train.n==n and dls.train.samples==2
    x,y = dls.one_batch()
    assert x.affine is None and y.affine is None, 'a batch has no place'
    a,b = [torch.cat([o[0] for o in dls.valid]) for _ in range(2)]
    assert len(a)==4 and torch.equal(a, b), 'validation patches stay where they are'

def test_weighted_dataloaders_keep_patches(cases):
    path,df = cases
    dls = mask_block(path).weighted_dataloaders(df, [1,0,0,3,1,1], bs=2, samples=2, num_workers=0)
    check_patches(dls, 8)
    drawn = [int(i)%4 for _ in range(40) for i in dls.train.get_idxs()]
    assert set(drawn)=={0,3} and .15<np.mean(np.array(drawn)==0)<.35, 'cases are drawn by their weights'
    torch.manual_seed(0)
    patches = torch.cat([o[0] for o in dls.train]).flatten(1)
    assert len(patches.unique(dim=0))==len(patches), 'a case that is drawn twice gives two patches'
    one = dls.train.new(shuffle=False, drop_last=False)
    assert [i%4 for i in one.get_idxs()]==[0,1,2,3]*2, 'in order, every case is there'
    with pytest.raises(InputError, match='4 training cases.*3'): dls.train.new(wgts=[1,2,3])

def test_partial_dataloaders_keep_patches(cases):
    path,df = cases
    dls = mask_block(path).datasets(df).partial_dataloaders(partial_n=3, bs=1, samples=2, num_workers=0)
    check_patches(dls, 8)
    assert len(dls.train)==3 and len(list(dls.train))==3

def test_weighted_dataloaders_of_ready_dls(cases, cache):
    path,df = cases
    dls = VolumeDataLoaders.from_df(df, path, codes=CODES, patch=(8,8,8), bs=2, samples_per_case=2, cache=cache, num_workers=0)
    n = len(dls.train_ds)
    w = dls.weighted_dataloaders([1]+[0]*(n-1))
    assert isinstance(w, VolumeDataLoaders) and w.valid is dls.valid and w.plan==dls.plan
    assert {i%n for i in w.train.get_idxs()}=={0} and w.one_batch()[0].shape==dls.one_batch()[0].shape
    assert len(dls.partial_dataloaders(2).train)==1
    with pytest.raises(InputError, match='training cases'): dls.weighted_dataloaders([1.])

def test_weighted_dataloaders_of_others_stay_fastais():
    dls = Datasets(list(range(8)), [[lambda o: o]], splits=[[0,1,2,3],[4,5,6,7]]).weighted_dataloaders([1,1,1,1], bs=2)
    assert type(dls.train) is WeightedDL

def test_patches_without_patchdl_are_refused(cases):
    path,df = cases
    with pytest.raises(InputError, match='PatchDL.*TfmdDL'): mask_block(path).datasets(df).dataloaders(dl_type=TfmdDL, bs=2, after_item=[PatchTransform((8,8,8))])

# A split by hand

def test_random_splitter_that_parts_a_subject_warns(cases):
    path,df = cases
    _,said = warned(lambda: mask_block(path, IndexSplitter([1,2])).datasets(df), 'both sides')
    assert len(said)==1 and "'s0'" in said[0] and 'GroupSplitter' in said[0]
    _,said = warned(lambda: mask_block(path, GroupSplitter(df.subject)).datasets(df), 'both sides')
    assert not said
    _,said = warned(lambda: mask_block(path, IndexSplitter([1,2])).datasets(df.drop(columns='subject')), 'both sides')
    assert not said

# Freezing

@pytest.mark.parametrize('ndim', [2,3])
@pytest.mark.parametrize('name', [n for n in model_names() if n not in ('AttentionUnet','HighResNet','monai.UNet')])
def test_freeze_leaves_the_decoder_and_no_more(name, ndim):
    if ndim==2 and name in ('DenseVoxelNet','unet_cicek'): pytest.skip('a network for volumes')
    model = create_model(name, 1, 2, ndim=ndim, patch=(32,)*ndim)
    enc,rest = param_splitter(model)
    share = sum(p.numel() for p in enc)/sum(p.numel() for p in model.parameters())
    assert .3<share<.99 and .25<len(enc)/(len(enc)+len(rest))<.95, f'{name}: {len(enc)} tensors of {len(enc)+len(rest)} are the encoder'

def patch_learner(cases, arch='UNet', **kwargs):
    path,df = cases
    dls = mask_block(path).dataloaders(df, path=path, bs=2, num_workers=0)
    return unet3d_learner(dls, arch, **{**({'nf':4, 'depth':2} if arch=='UNet' else {}), **kwargs})

class Frozen(Callback):
    "Whether the encoder stands still, an epoch a row"
    def __init__(self): self.rows = []
    def before_train(self): self.rows.append(not any(p.requires_grad for p in self.opt.all_params(slice(0,1)).itemgot(0)))

def test_fine_tune_after_load_freezes_first(cases):
    learn,again = patch_learner(cases),patch_learner(cases)
    with learn.no_bar(), learn.no_logging(), again.no_bar(), again.no_logging():
        learn.fine_tune(1, cbs=(look:=Frozen()))
        assert look.rows==[False], 'from random weights no epoch is spent on a frozen encoder'
        learn.lr_find(num_it=12, show_plot=False)
        assert not learn.loaded, 'lr_find puts back what was there'
        again.load(learn.save('one').stem).fine_tune(1, cbs=(look:=Frozen()))
    assert look.rows==[True, False]

def test_freeze_without_an_encoder_says_so(cases):
    learn = patch_learner(cases, 'HighResNet')
    _,said = warned(learn.freeze, 'freeze')
    assert len(said)==1 and 'HighResNet' in said[0] and 'splitter' in said[0]

def test_fine_tune_of_an_exported_learner_freezes_first(cases):
    learn = patch_learner(cases)
    assert not pickle.loads(pickle.dumps(learn)).loaded, 'never trained'
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export()
    again = load_learner(learn.path/'export.pkl')
    again.dls = learn.dls
    with again.no_bar(), again.no_logging(): again.fine_tune(1, cbs=(look:=Frozen()))
    assert look.rows==[True, False]
