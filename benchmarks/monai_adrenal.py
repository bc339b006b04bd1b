"""The adrenal glands by MONAI's own recipe for 3D classification: the number that `adrenal.py` is compared with.

    # of one thread, as `OMP_NUM_THREADS=1 python benchmarks/adrenal.py` takes
    FASTMED_DATA=… python benchmarks/monai_adrenal.py --minutes 30

DenseNet121, Adam at 1e-4, cross-entropy, quarter turns as augmentation, no schedule, as MONAI's tutorial on 3D
classification has them. Three things are set by the comparison: the shapes lie in memory on the grid of `adrenal.py`,
and training ends by the clock. Batches of 8, since batch norm over the tutorial's 2 would be unfair. The last state is
scored, since the 98 must not choose one.
"""
import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from adrenal import shapes
from common import here, keep
from monai.data import ArrayDataset
from monai.networks.nets import DenseNet121
from monai.transforms import RandRotate90
from monai.utils import set_determinism
from torch.utils.data import DataLoader

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=30.)
    p.add_argument('--size', type=int, default=48)
    p.add_argument('--out', default=here/'adrenal.csv')
    a = p.parse_args()
    from fastmed.metrics.scores import scores_interval
    set_determinism(0)
    (x,y),(xv,yv) = shapes('train'),shapes('val')
    x,xv = [torch.cat([F.interpolate(torch.from_numpy(b[:,None]).float(), (a.size,)*3, mode='trilinear',
                                     align_corners=False) for b in np.array_split(o, len(o)//49+1)]) for o in (x,xv)]
    dl = DataLoader(ArrayDataset(x, RandRotate90(prob=.5), labels=torch.from_numpy(y.astype(np.int64))), batch_size=8,
                    shuffle=True, drop_last=True)
    net = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    opt = torch.optim.Adam(net.parameters(), 1e-4)
    loss = torch.nn.CrossEntropyLoss()
    t0,epochs = time.perf_counter(),0.
    while time.perf_counter()-t0<a.minutes*60:
        net.train()
        for xb,yb in dl:
            opt.zero_grad()
            loss(net(xb), yb).backward()
            opt.step()
            epochs += 1/len(dl)
            if time.perf_counter()-t0>=a.minutes*60: break
    took = (time.perf_counter()-t0)/60
    net.eval()
    with torch.no_grad(): prob = torch.cat([net(b).softmax(1)[:,1] for b in xv.split(8)]).numpy()
    of = scores_interval('category', ['normal','hyperplasia or mass'], pred=np.stack([1-prob, prob], 1),
                                      targ=yv.astype(int),
                                      n_boot=2000)
    keep([dict(what='MONAI DenseNet121', score=s, of=r.of, value=round(r.value, 4), low=round(r.low, 4),
            high=round(r.high, 4), cases=int(r.n), epochs=round(epochs, 1), size=a.size, minutes=round(took, 1)) for s,
            r in of.iterrows()], a.out, ['what','score','epochs','size'])
