"""Labels of a whole volume with many classes: fastmed's `slide_window` against MONAI's `sliding_window_inference`, same
network, windows, overlap and blending.

    # 200³, 15 classes, windows of 64³ and 96³: about 10 minutes on two cores
    python benchmarks/sliding.py
    # on a GPU, four windows at a time; what is measured is the GPU's memory
    python benchmarks/sliding.py --device cuda
    python benchmarks/sliding.py --net point             # a 1×1×1 convolution: what is left is the blending itself

Both run the same channels-last bfloat16 network (`make_fast`), one window at a time, overlap one half, Gaussian weights
of an eighth, and both end with class ids.
Each run has a process of its own, in turned order. `peak` is what the process held at most above what it held before,
the volume (not the answer) being there already.
The two place their windows alike only where the size minus the window is a multiple of the step, such as 192; `--size
192` therefore shows the agreement of the two.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import child, here, keep, peak, reset_peak, rss, wait


def network(name, classes):
    from fastmed.all import UNet
    from fastmed.learn.fast import make_fast
    torch.manual_seed(0)
    return make_fast(UNet(1, classes, nf=16, depth=4) if name=='unet' else torch.nn.Conv3d(1, classes, 1)).eval()

def volume(n):
    g = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.randn(1,1,*(max(2, n//12),)*3, generator=g), (n,)*3, mode='trilinear')[0]
    return x+.1*torch.randn(1,n,n,n, generator=g)

def run(a):
    net,x,w,gpu = network(a.net, a.classes).to(a.device),volume(a.size),a.window[0],a.device!='cpu'
    bs = 4 if gpu else 1
    if a.one=='fastmed':
        from fastmed.data.plan import patch_plan
        from fastmed.predict.windows import slide_window
        def go(x):
            return slide_window(x, net, patch_plan((w,)*3), a.classes, overlap=a.overlap, bs=bs, progress=False,
                                device=a.device)[0]
    else:
        from monai.inferers import sliding_window_inference
        def go(x):
            return sliding_window_inference(x[None].to(a.device), (w,)*3, bs, net, overlap=a.overlap,
                                            mode='gaussian').argmax(1)[0].to(torch.uint8).cpu()
    with torch.inference_mode():
        # one window and a row of them, to warm up
        go(x[:,:w,:w,:w].clone())
        go(x[:,:w,:w].clone())
        before = torch.cuda.memory_allocated() if gpu else rss()
        torch.cuda.reset_peak_memory_stats() if gpu else reset_peak()
        wait(a.device)
        t0 = time.perf_counter()
        lab = go(x)
        wait(a.device)
        s = time.perf_counter()-t0
    most = torch.cuda.max_memory_allocated() if gpu else peak()
    np.save(a.save, lab.numpy())
    return dict(seconds=s, peak=most-before, total=most)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=200)
    p.add_argument('--classes', type=int, default=15)
    p.add_argument('--window', type=int, nargs='+', default=[64,96])
    p.add_argument('--overlap', type=float, default=.5)
    p.add_argument('--net', choices=['unet','point'], default='unet')
    p.add_argument('--repeats', type=int, default=2)
    p.add_argument('--one', help=argparse.SUPPRESS)
    p.add_argument('--save', help=argparse.SUPPRESS)
    p.add_argument('--device', default='cpu')
    p.add_argument('--out', default=here/'sliding.csv')
    a = p.parse_args()
    if a.one: print('\n'+json.dumps(run(a)))
    else:
        rows = []
        for w in a.window:
            got = dict(fastmed=[], monai=[])
            with tempfile.TemporaryDirectory() as tmp:
                for i in range(a.repeats):
                    for k in list(got)[::1 if i%2==0 else -1]:
                        got[k].append(child(__file__, '--one', k, '--save', Path(tmp)/f'{k}.npy', '--size', a.size,
                                            '--classes', a.classes, '--window', w, '--overlap', a.overlap, '--net',
                                            a.net, '--device', a.device))
                same = float((np.load(Path(tmp)/'fastmed.npy')==np.load(Path(tmp)/'monai.npy')).mean())
            r = {k:dict(s=min(o['seconds'] for o in v), gb=max(o['peak'] for o in v)/1e9,
                    total=max(o['total'] for o in v)/1e9) for k,v in got.items()}
            rows.append(dict(net=a.net, size=a.size, classes=a.classes, window=w,
                    **{f'{k}_s':round(v['s'], 2) for k,v in r.items()},
                    time_ratio=round(r['fastmed']['s']/r['monai']['s'], 3),
                             **{f'{k}_peak_gb':round(v['gb'], 3) for k,v in r.items()},
                    memory_ratio=round(r['fastmed']['gb']/r['monai']['gb'], 3),
                    **{f'{k}_process_gb':round(v['total'], 3) for k,v in r.items()}, same_labels=round(same, 5)))
        keep(rows, a.out, ['net','size','classes','window'], a.device)
