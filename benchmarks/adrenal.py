"""Volumes from nothing: is the adrenal gland normal, or enlarged or grown? 1188 shapes of 64³ voxels to train, 98 to
judge by, as MedMNIST divides them.

    # at most 20 minutes on two cores, after the files are written; --nets 0: measured alone, 3 minutes
    FASTMED_DATA=… python benchmarks/adrenal.py

The arrays become NIfTI files once (fastmed reads files), and a few lines train. The 98 choose nothing: what is
measured, the depth and the encoder were chosen on folds of the 1188 (`--folds`).
A linear model on a grid of 16³ reaches an AUC of 0.855, the mean thickness of the gland alone 0.843. A mask is measured
best: `shape_net` weighs 122 measures of its shape.
Beside it, convolutional networks of several seeds. Thickness is what a mask says least plainly to a convolution, so
they also see how deep each voxel lies below the surface, as a second channel.
259 diseased glands are few. So their encoder first learns a question that needs no labels but "normal": which glands
did we give a round growth, or make thicker?
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import here, keep, quiet


def shapes(part):
    "The masks (n,64,64,64) of 'train' or 'val', and whether each is diseased"
    with np.load(Path(os.environ['FASTMED_DATA'])/'adrenal'/'adrenal_64.npz') as z:
        return z[f'{part}_images']>0, z[f'{part}_labels'].ravel()>0

def save(folder, name, make):
    """Write the mask that `make()` gives, and the depth of its voxels below the surface in units of four, as NIfTI
    files where they are not there yet; their names"""
    import nibabel as nib
    from scipy.ndimage import distance_transform_edt
    shape,deep = folder/f'{name}.nii.gz',folder/f'{name}_depth.nii.gz'
    if not (shape.exists() and deep.exists()):
        x = make()
        nib.save(nib.Nifti1Image(x.astype(np.uint8), np.eye(4)), shape)
        nib.save(nib.Nifti1Image((distance_transform_edt(x)/4).astype(np.float32), np.eye(4)), deep)
    return dict(case=name, shape=shape.name, depth=deep.name)

def nodule(x, rng):
    "The mask with an ellipsoid of 3.5 to 9 voxels' radius that begins at one of its voxels"
    grid = np.stack(np.meshgrid(*map(np.arange, x.shape), indexing='ij'), -1)
    sides = np.exp(rng.normal(0, .2, 3))
    radius = np.exp(rng.uniform(np.log(3.5), np.log(9)))
    at = (grid-rng.choice(np.argwhere(x))-rng.normal(0, 2, 3)) @ np.linalg.qr(rng.normal(size=(3,3)))[0]
    return x | (((at/(radius*sides/np.prod(sides)**(1/3)))**2).sum(-1)<1)

def thicker(x, rng):
    "The mask with 1 to 2 voxels more all around, or here more and there less"
    from scipy.ndimage import distance_transform_edt, gaussian_filter
    by = rng.uniform(1, 2.3)
    field = gaussian_filter(rng.normal(size=x.shape), 10)
    field = (field-field.min())/np.ptp(field)
    return x | (distance_transform_edt(~x)<=by*(field if rng.random()<.5 else 1))

def grown(x, seed):
    "A normal mask made ill: larger by a twentieth or more, or a label would be wrong"
    rng = np.random.default_rng(seed)
    while True:
        y = nodule(x, rng) if rng.random()<.6 else thicker(x, rng)
        if rng.random()<.15: y = nodule(y, rng)
        if y.sum()>=1.05*x.sum(): return y

def tables(folder):
    """Two tables of files, which are written where they are missing: the glands with their labels, and normal glands of
    the training part beside what we made of them"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows,made = [],[]
    for part in ('train','val'):
        for i,(x,ill) in enumerate(zip(*shapes(part))):
            rows.append(dict(save(folder, f'{part}_{i:04}', lambda: x),
                             label=['normal','hyperplasia or mass'][int(ill)], held=part=='val'))
            if part=='train' and not ill:
                made.append(dict(rows[-1], label='as it was', gland=i))
                made += [dict(save(folder, f'grown_{i:04}_{k}', lambda: grown(x, (i,k))), label='made ill', gland=i)
                              for k in range(2)]
    # the second is the positive class
    return [pd.DataFrame(r).assign(label=lambda d: pd.Categorical(d.label, c)) for r,
            c in ((rows, ['normal','hyperplasia or mass']), (made, ['as it was','made ill']))]

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--first', type=int, default=10,
                   help='epochs of the encoder on the glands that we made ill; 0: none')
    p.add_argument('--size', type=int, default=48)
    p.add_argument('--nets', type=int, default=7, help='convolutional networks, a seed each; 0: none')
    p.add_argument('--folds', action='store_true', help='instead, what the measures, the depth and the encoder are '
                                                        'worth, on five folds of the 1188 (--size 32: 35 minutes of '
                                                        'one thread)')
    p.add_argument('--files', default=None, help='folder of the NIfTI files; default: below the cache')
    p.add_argument('--out', default=None, help='default: adrenal.csv, or adrenal_folds.csv')
    return p.parse_args()

def learner(df, files, a, depth=True, **kwargs):
    from fastmed.all import VolumeDataLoaders, classifier_learner, volume_tfms
    # a shape has no grey values to change
    looks = volume_tfms(max_rotate=15., max_scale=.1, p_contrast=0., p_brightness=0., p_gamma=0., p_noise=0., p_blur=0.,
                        p_low_res=0.)
    with quiet():
        dls = VolumeDataLoaders.from_df(df, files, image_col=['shape','depth'] if depth else 'shape', label_col='label',
                                        size=a.size, normalize='none', bs=32, device='cpu', batch_tfms=looks, **kwargs)
        return classifier_learner(dls, 'small_resnet', wd=.05, metrics=[], weight='balanced' if 'gland' in df else None)

def measured(df, files):
    "A Learner that weighs the measures of each shape"
    from fastmed.all import VolumeDataLoaders, classifier_learner
    with quiet():
        dls = VolumeDataLoaders.from_df(df, files, image_col='shape', label_col='label', size=64, normalize='none',
                                        bs=32, device='cpu', batch_tfms=[], valid_col='held')
        learn = classifier_learner(dls, 'shape_net', metrics=[])
    with learn.no_bar(): learn.fit_one_cycle(10, 3e-3)
    return learn

def pretrain(made, files, a):
    "A Learner that has learned which glands we made ill"
    learn = learner(made, files, a, valid_pct=.05, group_col='gland')
    with learn.no_bar(): learn.fit_one_cycle(a.first, 3e-3)
    return learn

def train(df, files, a, encoder=None, depth=True):
    "A Learner of the labels, from random weights or from an encoder"
    learn = learner(df, files, a, depth, valid_col='held')
    if encoder is not None: learn.load_encoder(encoder)
    with learn.no_bar(): learn.fit_one_cycle(a.epochs, 3e-3 if encoder is None else 1e-3)
    return learn

def folds(df, made, files, a):
    """Out-of-fold AUC of a convolutional network from the shape, with the depth, and with the encoder too; and from the
    measures. The encoder of a fold has seen none of its glands"""
    from sklearn.model_selection import StratifiedKFold

    from fastmed.all import roc_auc, set_seed
    df = df[~df.held].reset_index(drop=True)
    y = (df.label.cat.codes==1).to_numpy(float)
    encoder = (files/'fold.safetensors').resolve()
    parts = list(StratifiedKFold(5, shuffle=True, random_state=0).split(y, y))
    arms = {k:np.full(len(y), np.nan) for k in ('shape','shape and depth','shape and depth, encoder first',
                                                'shape, measured')}
    for _,test in parts:
        d = df.assign(held=np.isin(np.arange(len(df)), test))
        set_seed(0)
        pretrain(made[~made.gland.isin(test)], files, a).save_encoder(encoder)
        for k,p in arms.items():
            set_seed(0)
            if 'measured' in k: learn = measured(d, files)
            else: learn = train(d, files, a, encoder if 'encoder' in k else None, 'depth' in k)
            with quiet(): p[test] = learn.evaluate(d[d.held], tta=False if 'measured' in k else 8).arrays()[1][:,1]
    def of(p, i): return np.mean([roc_auc(pred=p[j], targ=y[j]) for j in (i[np.isin(i, t)] for _,t in parts)])
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(y), size=len(y)) for _ in range(2000)]
    every = np.arange(len(y))
    base = [of(arms['shape'], i) for i in draws]
    rows = []
    for k,p in arms.items():
        of_draws = np.array([of(p, i) for i in draws])
        low,high = np.quantile(of_draws, [.025,.975])
        gl,gh = np.quantile(of_draws-base, [.025,.975])
        rows.append(dict(what=k, roc_auc=round(of(p, every), 4), low=round(low, 4), high=round(high, 4),
                gain=round(of(p, every)-of(arms['shape'], every), 4), gain_low=round(gl, 4), gain_high=round(gh, 4),
                                                cases=len(y), epochs=a.epochs, first=a.first, size=a.size))
    keep(rows, a.out or here/'adrenal_folds.csv', ['what','epochs','first','size'])

if __name__=='__main__':
    a = arguments()
    from fastmed.all import Ensemble, cache_dir, set_seed
    files = Path(a.files or cache_dir()/'adrenal')
    df,made = tables(files)
    nets,rows,t0 = [],[],time.perf_counter()
    if a.folds:
        folds(df, made, files, a)
        raise SystemExit
    def note(what, learn, epochs, *args, size=a.size, **kwargs):
        with quiet(): su = learn.evaluate(*args, **kwargs).summary(n_boot=2000)
        rows.extend(dict(what=what, score=s, of=r.of, value=round(r.value, 4), low=round(r.low, 4),
                         high=round(r.high, 4), cases=int(r.n), epochs=epochs, size=size,
                         minutes=round((time.perf_counter()-t0)/60, 1)) for s,r in su.iterrows())
    set_seed(0)
    note('shape, measured', measured(df, files), 10, df[df.held], size=64)
    encoder = (files/'grown.safetensors').resolve() if a.first and a.nets else None
    if encoder is not None:
        set_seed(0)
        first = pretrain(made, files, a)
        first.save_encoder(encoder)
        note('made ill or not, glands not seen', first, a.first)
    for seed in range(a.nets):
        set_seed(seed)
        nets.append(train(df, files, a, encoder))
        note(f'network {seed}', nets[-1], a.epochs, df[df.held], tta=8)
    if a.nets>1: note(f'{a.nets} networks together', Ensemble(nets), a.epochs, df[df.held], tta=8)
    keep(rows, a.out or here/'adrenal.csv', ['what','score','epochs','size'])
