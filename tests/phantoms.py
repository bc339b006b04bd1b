"What several tests share: phantoms on any grid, a network that needs no training, a fresh process."
import os
from pathlib import Path

import forked
import nibabel as nib
import numpy as np
import torch
from torch import nn

import fastmed
from fastmed.data.datasets import phantom

CODES = ['background','large','small']

def affine_of(
    code='RAS',          # where the axes point
    spacing=(1.,1.,1.),  # mm
    origin=(0.,0.,0.)    # mm
):                       # (4,4)
    "The affine of a grid in a given order"
    a = np.eye(4)
    a[:3,:3] = 0
    for i,(c,s) in enumerate(zip(code, spacing)):
        r = next(r for r,p in enumerate(('RL','AP','SI')) if c in p)
        a[r,i] = s*(1 if c in 'RAS' else -1)
    a[:3,3] = origin
    return a

def write_case(
    folder,         # gets `images/` and `labels/`
    name,           # of the case
    affine=None,    # (4,4)
    # image and mask: what is done to the arrays before they are written
    shape=(20,20,20), seed=0, image=lambda a: a, mask=lambda m: m, mask_affine=None
):                  # dict of one row
    "A phantom on disk, under relative names"
    im,m = phantom(shape, affine, seed)
    for sub,x,f,aff in (
            (('images',im,image,im.affine),('labels',m,mask,im.affine if mask_affine is None else mask_affine))):
        (Path(folder)/sub).mkdir(parents=True, exist_ok=True)
        a = f(np.asarray(x.dataobj))
        nib.save(nib.Nifti1Image(a, aff), Path(folder)/sub/f'{name}.nii')
    return dict(case=name, image=f'images/{name}.nii', mask=f'labels/{name}.nii')

class Nearest(nn.Module):
    "A network that is right without training: the class whose number the voxel is nearest to"
    def __init__(self, n_in, n_out, ndim=3):
        super().__init__()
        k = torch.arange(float(n_out))
        self.conv = (nn.Conv3d if ndim==3 else nn.Conv2d)(n_in, n_out, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:,n_in//2] = 2*k.view(-1,*(1,)*ndim)
            self.conv.bias.copy_(-k**2)
        self.divisor,self.calls = (1,)*ndim,0
    def forward(self, x):
        self.calls += len(x)
        return self.conv(x)

class Edge(Nearest):
    "As `Nearest`, of the neighbour one voxel further along the first spatial axis: it knows which way it looks"
    def forward(self, x): return super().forward(x.roll(-1, 2))

def python(
    code,    # of a script; it may print
    *args,   # strings for `sys.argv`
    timeout=1800, **env # environment variables
):           # what it printed
    "Run a script in a process that has imported the fastmed of this process and done nothing else"
    path = os.pathsep.join([str(Path(fastmed.__file__).parent.parent), str(Path(__file__).parent),
            *filter(None, [os.environ.get('PYTHONPATH')])])
    env = {**os.environ, 'PYTHONPATH':path, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', **env}
    fn = Path(args[0])/'script.py'
    fn.write_text(code, encoding='utf-8')
    r = forked.run([fn, *args], args[0], env, timeout)
    assert r.returncode==0, r.stderr[-4000:]
    return r.stdout

def dies(
    when # expression of `self`, the Learner, and `i`, the batch
):       # code to be put before a script
    """A process that ends itself by SIGKILL in front of a batch; one killed from outside, by the clock, would be outrun
    on a fast machine"""
    return f"""
import os, signal
from pathlib import Path
from fastai.learner import Learner
def one_batch(self, i, b, batch=Learner.one_batch):
    if {when}: os.kill(os.getpid(), signal.SIGKILL)
    batch(self, i, b)
Learner.one_batch = one_batch
"""

# What a Learner answers, as arrays: run here and in a fresh process
ANSWERS = """
from fastmed.all import *
def answers(learn, new, files):
    with learn.no_bar():
        m = learn.predict_volume(new)
        mp,p = learn.predict_volume(new, proba=True, tta=True)
        dec,ids,probs = learn.predict(new)
        preds,_ = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))
    return dict(volume=m.numpy(), affine=m.affine, tta=mp.numpy(), proba=p.numpy(), decoded=dec.numpy(),
                ids=ids.numpy(), probs=probs.numpy(), preds=preds.numpy(),
                pre=np.array(learn.dls.preprocess.to_json()))
"""

def shaken(m, seed=0):
    "`m` in evaluation, its norms with statistics and weights of their own"
    import torch
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n,b in m.named_buffers():
            if n.endswith('running_mean'): b.normal_(0, .1, generator=g)
            if n.endswith('running_var'): b.uniform_(.5, 1.5, generator=g)
        for p in m.parameters():
            if p.ndim==1: p += .1*torch.randn(p.shape, generator=g)
    return m.eval()
