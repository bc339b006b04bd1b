"What a person who knows fastai does in a training, and what would be wrong without a word."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (
    BCEWithLogitsLossFlat,
    Callback,
    EarlyStoppingCallback,
    MixUp,
    SaveModelCallback,
    Transform,
    load_learner,
    nn,
    set_seed,
)
from phantoms import CODES, write_case

from fastmed.all import (
    BudgetCallback,
    CostCallback,
    DiceCallback,
    DiceCELoss,
    Ensemble,
    PictureCallback,
    ResumeCallback,
    TensorVolume,
    VolumeDataLoaders,
    classifier_learner,
    compare_learners,
    label_efficiency,
    load_model,
    regression_learner,
    restoration_learner,
    save_model,
    unet3d_learner,
)
from fastmed.core import InputError

ARGS = dict(codes=CODES, spacing=1., patch=16, bs=2, samples_per_case=2, num_workers=0, device='cpu', valid_col='valid')

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "Six phantoms with labels of every kind: a DataFrame with absolute names"
    path = tmp_path_factory.mktemp('cases')
    df = pd.DataFrame([write_case(path, f'c{i}', None, (16,16,16), seed=i) for i in range(6)])
    for c in ('image','mask'): df[c] = [str(path/o) for o in df[c]]
    return df.assign(patient=[f'p{i//2}' for i in range(6)], y=['no','yes']*3, age=50.+np.arange(6),
                     f1=[0,1]*3, f2=[0,0,1]*2, valid=[False]*4+[True]*2)

def volumes(df, **kwargs): return VolumeDataLoaders.from_df(df, **{**ARGS, **kwargs})
def labelled(df, label_col, **kwargs):
    return VolumeDataLoaders.from_df(df, label_col=label_col, valid_col='valid', spacing=1., bs=2, num_workers=0,
                                     device='cpu', **kwargs)
def unet(dls, path='.', **kwargs): return unet3d_learner(dls, path=path, **{'nf':4, 'depth':2, **kwargs})
def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

# ---- callbacks that follow a monitor

@pytest.mark.parametrize('monitor', ['mae','valid_mae','mae_age','_rmse','valid_loss','error_rate'])
def test_an_error_is_better_where_it_is_smaller(monitor):
    assert SaveModelCallback(monitor).comp is np.less
    assert SaveModelCallback(monitor, comp=np.greater).comp is np.greater

@pytest.mark.parametrize('monitor', ['dice','roc_auc','r2','dice_mae_root'])
def test_a_score_is_better_where_it_is_larger(monitor): assert EarlyStoppingCallback(monitor).comp is np.greater

def never(pred, targ): return float('nan')

def test_the_best_of_another_training_is_not_loaded(cases, tmp_path):
    dls = volumes(cases)
    one,two = unet(dls, tmp_path),unet(dls, tmp_path, metrics=never)
    quiet(one, lambda o: o.fit(1, 1e-2, cbs=SaveModelCallback()))
    with pytest.warns(UserWarning, match="'never' was no number"):
        quiet(two, lambda o: o.fit(1, 1e-2, cbs=SaveModelCallback('never')))
    assert not torch.equal(weights(one), weights(two))

@pytest.mark.parametrize('monitor', ['valid_loss','dice'])
def test_validate_leaves_the_best_model_alone(cases, tmp_path, monitor):
    learn = unet(volumes(cases), tmp_path, cbs=SaveModelCallback(monitor))
    quiet(learn, lambda o: o.fit(1, 1e-2))
    kept = (tmp_path/'models'/'model.pth').read_bytes()
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    quiet(learn, lambda o: o.validate())
    assert (tmp_path/'models'/'model.pth').read_bytes()==kept
    assert not weights(learn).any()

class Interrupt(Callback):
    order = 90
    def after_batch(self): raise KeyboardInterrupt

def test_a_fit_with_mixup_that_is_interrupted_leaves_the_loss(cases):
    learn = classifier_learner(labelled(cases, 'y'), 'small_resnet')
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda o: o.fit(1, cbs=[MixUp(), Interrupt()]))
    assert learn.loss_func is loss
    assert quiet(learn, lambda o: o.get_preds())[0].sum(1).allclose(torch.ones(2))

def test_a_repaired_image_has_no_dice(cases):
    learn = restoration_learner(volumes(cases), nf=4, depth=2)
    with pytest.raises(InputError, match='DiceCallback'): quiet(learn, lambda o: o.fit(1, cbs=DiceCallback()))
    learn = classifier_learner(labelled(cases, 'y'), 'small_resnet')
    with pytest.raises(InputError, match='DiceCallback'): quiet(learn, lambda o: o.fit(1, cbs=DiceCallback()))

def test_epochs_that_are_passed_over_cost_nothing(cases):
    learn = unet(volumes(cases))
    cost = CostCallback()
    quiet(learn, lambda o: o.fit_one_cycle(3, start_epoch=2, cbs=[cost, BudgetCallback(updates=99)]))
    assert cost.total['epochs']==1

def test_pictures_do_not_change_what_is_learnt(cases, tmp_path):
    dls,found = volumes(cases),[]
    for cbs in (None, PictureCallback(n=1)):
        set_seed(3, True)
        for dl in dls.loaders: dl.rng.seed(3)
        learn = unet(dls, tmp_path)
        quiet(learn, lambda o, cbs=cbs: o.fit(2, 1e-2, cbs=cbs))
        found.append(weights(learn))
    assert torch.equal(*found)

# ---- who was seen, what was drawn, which channel

def test_patches_of_a_case_differ_whatever_its_columns_are_called(cases):
    for column in (range(1, 7), [f'S{i}' for i in range(6)]):
        dl = volumes(cases.assign(sample=column), samples_per_case=12, patch=8).valid
        x = torch.cat([b[0] for b in dl]).as_subclass(torch.Tensor)
        assert len({float(o.sum()) for o in x})==len(x)>2

def test_subjects_that_stand_in_a_column_of_their_own_are_known(cases, tmp_path):
    learn = unet(volumes(cases.drop(columns='valid'), valid_col=None, group_col='patient', valid_pct=.34))
    quiet(learn, lambda o: o.fit(1))
    trained = set(learn.dls.train_ds.items.patient)
    other = cases[cases.patient.isin(trained)].assign(case=lambda d: 'x'+d.case)
    assert len(learn.saw(other))==len(other)
    learn.export(tmp_path/'m.pkl')
    assert len(load_learner(tmp_path/'m.pkl').saw(other))==len(other)
    save_model(learn, tmp_path/'m.safetensors')
    assert len(load_model(tmp_path/'m.safetensors').saw(other, 'patient'))==len(other)
    with pytest.raises(InputError, match='every case was seen'):
        compare_learners({'a':tmp_path/'m.safetensors'}, other, group_col='patient')

def test_channels_in_another_order_are_refused(cases):
    df = cases.assign(second=cases.image)
    learn = unet(volumes(df, image_col=['image','second']))
    with pytest.raises(InputError, match='same order'): learn.dls = volumes(df, image_col=['second','image'])
    with pytest.raises(InputError, match='channels'):
        Ensemble([learn, unet(volumes(df, image_col=['second','image']))])

def test_an_ensemble_of_one_and_two_channels_is_a_mean_of_probabilities(cases):
    dls = volumes(cases, codes={'background':0, 'organ':[1,2]})
    one,two = unet(dls, n_out=1),unet(dls)
    p,_ = quiet(one, lambda o: o.get_preds())
    q,_ = quiet(two, lambda o: o.get_preds())
    wanted = (torch.cat([1-p, p], 1)+q)/2
    for members in ([one,two],[two,one]):
        with one.no_bar(), two.no_bar(): mean,_ = Ensemble(members).get_preds()
        assert mean.allclose(wanted, atol=1e-6)

# ---- arguments that are accepted are used

def test_weights_and_losses_that_would_do_nothing_are_refused(cases):
    dls = labelled(cases, ['f1','f2'])
    with pytest.raises(InputError, match='pos_weight'): classifier_learner(dls, 'small_resnet', weight='balanced')
    dls = labelled(cases, 'y')
    with pytest.raises(InputError, match='loss='): classifier_learner(dls, 'small_resnet', loss='l1')
    dls = labelled(cases, 'age')
    with pytest.raises(InputError, match='balanced'): regression_learner(dls, 'small_resnet', weight='balanced')
    with pytest.raises(InputError, match='loss='):
        regression_learner(dls, 'small_resnet', loss='l1', loss_func=nn.MSELoss())

def test_a_threshold_that_only_pictures_would_follow_is_refused(cases):
    dls = volumes(cases, codes={'background':0, 'organ':[1,2]})
    with pytest.raises(InputError, match='decides at 0.2'): unet(dls, n_out=1, loss_func=DiceCELoss(thresh=.2))
    dls = labelled(cases, ['f1','f2'])
    with pytest.raises(InputError, match='decides at 0.3'):
        classifier_learner(dls, 'small_resnet', loss_func=BCEWithLogitsLossFlat(thresh=.3))

# ---- a training that goes on is the same training

class Scale(Transform):
    def __init__(self, k): self.k = k
    def encodes(self, x:TensorVolume): return x*self.k[0]

class EndOfEpoch(Callback):
    order = 70
    def after_epoch(self): raise KeyboardInterrupt

@pytest.mark.parametrize('what', ['weights','damage','number','tensor','seed'])
def test_another_training_is_not_gone_on_with(cases, tmp_path, what):
    dls = volumes(cases)
    def drawn(w): return unet(dls.weighted_dataloaders(w), tmp_path)
    def damaged(p): return restoration_learner(dls, p=p, nf=4, depth=2, path=tmp_path)
    def partial(n): return unet(dls.partial_dataloaders(n), tmp_path)
    def scaled(k): return unet(volumes(cases, item_tfms=Scale(torch.tensor([k]))), tmp_path)
    def seeded(s): return unet(volumes(cases, seed=s), tmp_path)
    make,was,now = dict(weights=(drawn,[1,2,3,4],[4,3,2,1]), damage=(damaged,.5,.9), number=(partial,4,5),
                        tensor=(scaled,1.,2.), seed=(seeded,42,43))[what]
    with pytest.raises(KeyboardInterrupt):
        quiet(make(was), lambda o: o.fit(2, cbs=[ResumeCallback(), EndOfEpoch()]))
    with pytest.raises(InputError, match='is of another fit'):
        quiet(make(now), lambda o: o.fit(2, cbs=ResumeCallback()))
    quiet(make(was), lambda o: o.fit(2, cbs=ResumeCallback()))

# ---- studies

@pytest.mark.parametrize('label_col', [['f1','f2'],['age','more']])
def test_label_efficiency_of_several_labels(cases, tmp_path, label_col):
    df = cases.assign(more=3.*cases.age)
    def make(d):
        dls = VolumeDataLoaders.from_df(d, valid_col='_held_out', label_col=label_col, device='cpu', num_workers=0,
                                        spacing=1.)
        return classifier_learner(dls, 'small_resnet')
    found = label_efficiency(df, (2,), repeats=1, make=make, budget=dict(updates=1), valid_col='valid',
                             path=tmp_path)
    t = found.table
    if label_col[0]=='f1': wanted = np.nanmean([auc_of(t, o) for o in label_col])
    else:
        targ,pred = t[[f'target_{o}' for o in label_col]],t[[f'pred_{o}' for o in label_col]]
        wanted = np.mean(np.abs(pred.values-targ.values)/targ.std(ddof=0).values)
    assert found.summary().score.item()==pytest.approx(wanted)

def auc_of(t, name):
    from sklearn.metrics import roc_auc_score
    y = t[f'target_{name}']
    return roc_auc_score(y, t[f'prob_{name}']) if y.nunique()==2 else np.nan
