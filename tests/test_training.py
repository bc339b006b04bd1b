"Callbacks and evaluation, where a fit is cut short, interrupted, or a case fails."
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastmed.all import (BudgetCallback, DiceCallback, VolumeDataLoaders, unet3d_learner, TensorVolumeMask, load_mask, save_volume, scan_folder, summarise)
from phantoms import write_case, CODES

@pytest.fixture
def learn(tmp_path):
    rows = [write_case(tmp_path, f'c{i}', np.eye(4), (16,16,16), i) for i in range(6)]
    dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), tmp_path, codes=CODES, patch=16, bs=1, samples_per_case=8, cache=tmp_path/'s', device='cpu', batch_tfms=None)
    return unet3d_learner(dls, nf=4, depth=2)

def test_a_cut_epoch_keeps_its_columns(learn):
    "The training loss of the epoch that the clock cut short is logged, so no column moves"
    with learn.no_bar(), learn.no_logging(): learn.fit_for(1/60)
    rows = learn.recorder.values
    assert {len(r) for r in rows}=={len(learn.recorder.metric_names)-2}
    assert learn.recorder.lrs[-1]<max(learn.recorder.lrs)

class Stop(Callback):
    def after_validate(self): raise KeyboardInterrupt

def test_an_interrupted_fit_leaves_no_columns(learn):
    learn.add_cb(DiceCallback())
    n = len(learn.metrics)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
        learn.fit(1)
        names = list(learn.recorder.metric_names)
        assert len(names)==len(set(names)) and len(learn.metrics)==n
        learn.get_preds()

def test_the_last_epoch_of_a_time_budget_gets_its_look(learn):
    learn.add_cb(DiceCallback(every=1000))
    with learn.no_bar(), learn.no_logging(): learn.fit_for(1/60)
    assert len(learn.dice.cases)

def test_augmented_looks_see_the_same_patches(learn):
    with learn.no_bar():
        a,ta = learn.tta(ds_idx=0, tta=())
        b,tb = learn.tta(ds_idx=0, tta=())
    assert (ta==tb).all() and torch.allclose(a, b)

@pytest.mark.parametrize('values', [(-1,0,1000), (0,255), (0,256), (-5,3), (0,70000)])
def test_a_mask_is_stored_without_loss(values, tmp_path):
    m = TensorVolumeMask(torch.tensor(values, dtype=torch.int32).view(-1,1,1), affine=np.eye(4))
    assert load_mask(save_volume(m, tmp_path/'m.nii.gz')).flatten().tolist()==list(values)

def test_numbered_scans_are_no_channels(tmp_path):
    for n in ('ann_0000','ann_0001','bob_0001','bob_0002'): (tmp_path/f'{n}.nii.gz').touch()
    assert scan_folder(tmp_path, '*.nii.gz', masks=None).case.tolist()==['ann','bob_0001','bob_0002']

def test_the_line_of_all_counts_cases():
    rows = [dict(case=c, structure=s, dice=d, hd95=1., nsd=1., status=st) for c in 'xy' for s,d,st in (('a',0.,'missed'),('b',0.,'missed'),('c',np.nan,'empty'))]
    s = summarise(rows)
    assert s.loc['all',['n','failed','empty']].tolist()==[2,2,0] and s.loc['a','failed']==2

def test_writing_into_an_item_does_not_reach_the_store(learn):
    dl = learn.dls.valid
    before = dl.do_item(0)[0].clone(); dl.do_item(0)[0].zero_()
    assert (dl.do_item(0)[0]==before).all()

def test_a_thin_patch_tells_the_axis(tmp_path):
    "A patch with one side of 1 says which way it is cut; another axis beside it is refused"
    from fastmed.all import SliceDataLoaders
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', np.eye(4), (16,20,12), i) for i in range(4)]); kw = dict(codes=CODES, cache=tmp_path/'s', device='cpu')
    assert SliceDataLoaders.from_df(df, tmp_path, patch=(16,1,8), **kw).plan.axis==1
    with pytest.raises(ValueError, match='axis=0 was asked for'): SliceDataLoaders.from_df(df, tmp_path, patch=(16,1,8), axis=0, **kw)
