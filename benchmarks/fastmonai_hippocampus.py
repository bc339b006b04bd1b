"""fastMONAI's tutorial recipe for segmentation, trained on the hippocampus for a given number of minutes: the number
that fastmed is compared with.

Its own environment is wanted: `python3 -m venv peer && peer/bin/pip install fastMONAI`, then
`FASTMED_DATA=... peer/bin/python benchmarks/fastmonai_hippocampus.py --minutes 10`.

The recipe is that of the tutorial on multi-class segmentation: `ZNormalization`, `PadOrCrop`, `RandomAffine` of 5
degrees, batches of four whole
crops, MONAI's residual `UNet` of (16,32,64,128,256), Dice + cross-entropy, `ranger`, flat then cosine. The rate is
1e-1, as public copies of
the recipe have it; `--lr find` takes the finder's valley instead. Three things are set by the comparison: the
size (the largest crop, rounded up to what the network can halve four times), the schedule (the same curve, by the share
of the time that has gone) and all training
cases used for training. Start-up, the learning-rate finder (`--lr find`) and prediction are not counted as training
time."""
import argparse
import csv
import os
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings('ignore')
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import CancelFitException, CancelValidException
from fastai.callback.schedule import combined_cos
from fastMONAI.vision_all import *
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

sys.path.insert(0, str(Path(__file__).resolve().parent))
from folds import split

structures = ('anterior', 'posterior')

class FlatCosFor(Callback):
    "`fit_flat_cos` by elapsed share: stops after `seconds`, wherever the epoch stands"
    order = 60
    def __init__(self, seconds, lr, pct_start=.75, div_final=1e5):
        self.seconds,self.steps,self.sched = seconds,0,combined_cos(pct_start, lr, lr, lr/div_final)
    def before_fit(self): self.t0 = time.perf_counter()
    def before_batch(self):
        if self.training: self.opt.set_hyper('lr', self.sched(min(1., (time.perf_counter()-self.t0)/self.seconds)))
    def after_batch(self):
        self.steps += 1
        if time.perf_counter()-self.t0 >= self.seconds: raise CancelFitException()
    def before_validate(self): raise CancelValidException()
    def after_fit(self): self.took = time.perf_counter()-self.t0

def dice(pred, targ): # two boolean arrays → 0 to 1, nan where both are empty
    n = pred.sum() + targ.sum()
    return float(2*(pred&targ).sum()/n) if n else float('nan')

def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, default=10., help='of training')
    p.add_argument('--fold', type=int, default=0, help='kept back')
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--lr', default='1e-1', help="a number, or 'find' for the finder's valley")
    p.add_argument('--workers', type=int, default=2, help='processes that read')
    p.add_argument('--n-test', type=int, default=None, help='kept-back cases to predict, all by default')
    p.add_argument('--out', default=str(Path(__file__).with_name('hippocampus_dice.csv')),
                   help='one line a run is added here')
    p.add_argument('--cases', default=None, help='one line a case and structure is written here')
    return p.parse_args()

def learner(train, workers):
    "The tutorial's Learner, and the size of its crops"
    shapes = np.array([nib.load(o).shape for o in train['image']])
    size = [int(16*np.ceil(o/16)) for o in shapes.max(0)]
    dblock = MedDataBlock(blocks=(ImageBlock(cls=MedImage), MedMaskBlock), splitter=IndexSplitter([0]),
                          get_x=ColReader('image'), get_y=ColReader('mask'),
                          item_tfms=[ZNormalization(), PadOrCrop(size),
                                     RandomAffine(scales=0, degrees=5, isotropic=True)],
                          apply_reorder=True, target_spacing=[1.,1.,1.])
    # fastai wants a validation set: the first case stands there too, and is never looked at
    df = pd.concat([train.iloc[:1], train], ignore_index=True)
    dls = dblock.dataloaders(df, bs=4, num_workers=workers)
    model = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(16,32,64,128,256), strides=(2,2,2,2),
                 num_res_units=2)
    loss = CustomLoss(loss_func=DiceCELoss(to_onehot_y=True, include_background=True, softmax=True))
    return Learner(dls, model, loss_func=loss, opt_func=ranger),size

def scores(learn, test):
    "Dice of each case and structure"
    for r in test.itertuples():
        pred = np.asarray(inference(learn, True, [1.,1.,1.], fn=r.image).data[0])
        targ = np.asanyarray(nib.load(r.mask).dataobj)
        if pred.shape!=targ.shape: sys.exit(f'{r.case}: predicted {pred.shape}, the mask has {targ.shape}')
        for i,s in enumerate(structures, 1): yield dict(case=r.case, structure=s, dice=dice(pred==i, targ==i))

def add_row(fn, row):
    "Add a line to a table, which is made where it is missing"
    new = not Path(fn).exists()
    with open(fn, 'a', newline='') as f:
        w = csv.DictWriter(f, list(row))
        if new: w.writeheader()
        w.writerow(row)

def main():
    a = options()
    set_seed(a.seed)
    train,test = split(a.fold)
    assert not set(train.subject) & set(test.subject)
    learn,size = learner(train, a.workers)
    with learn.no_bar(), learn.no_logging():
        lr = learn.lr_find(show_plot=False).valley if a.lr=='find' else float(a.lr)
        print(f'{len(train)} training cases, {len(test)} kept back, size {size}, lr {lr:.3g}, '
              f'{torch.get_num_threads()} threads', flush=True)
        clock = FlatCosFor(60*a.minutes, lr)
        learn.fit(100_000, lr, cbs=clock)
        epochs = clock.steps/len(learn.dls.train)
        print(f'{clock.steps} steps, {epochs:.1f} epochs in {clock.took:.0f} s', flush=True)
        t0 = time.perf_counter()
        res = pd.DataFrame(scores(learn, test.head(a.n_test or len(test))))
    print(res.groupby('structure').dice.agg(['mean','std','median','min','count']).round(4).to_string())
    mean = res.dice.mean()
    print(f'mean Dice {mean:.4f} over {res.case.nunique()} cases, predicted in {time.perf_counter()-t0:.0f} s')
    if a.cases: res.to_csv(a.cases, index=False)
    of = {f'dice_{s}':round(res[res.structure==s].dice.mean(), 4) for s in structures}
    add_row(a.out, dict(who=f"fastMONAI {version('fastMONAI')}", recipe='tutorial 3D', minutes=a.minutes, fold=a.fold,
                        seed=a.seed, lr=f'{lr:.3g}', steps=clock.steps, epochs=round(epochs, 1),
                        cases=res.case.nunique(), **of, dice=round(mean, 4), torch=torch.__version__,
                        cores=os.cpu_count()))

if __name__ == '__main__': main()
