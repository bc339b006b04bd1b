"""How many labelled patients, and what is a head start worth? Pneumonia on chest radiographs, and the hippocampus.

    FASTMED_DATA=… python benchmarks/label_efficiency.py                      # both, about three hours of one core
    FASTMED_DATA=… python benchmarks/label_efficiency.py --what chest

The test subjects (30 %, drawn with a seed) are the same for every training, and are seen by no pretraining. Every start
gets the same network, the same training subjects and the same number of updates.
chest_xray, target pneumonia: from scratch; from an encoder that repaired damaged pictures of the training patients,
without labels; from an encoder that learnt their sex and age, the labels that every hospital has.
hippocampus: from scratch; from an encoder, and from all the weights, of a network that repaired damaged patches of the
training subjects.
"""
import argparse
import os
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import here, quiet


def test_subjects(df, group):
    from fastmed.study.efficiency import draw_order
    s = draw_order(df[group], seed=0)
    return df[group].isin(s[:round(.3*len(s))])

def chest(a, out):
    "`LabelEfficiency` of pneumonia"
    from fastmed.all import RadiographDataLoaders, classifier_learner, label_efficiency, restoration_learner, set_seed
    root = Path(os.environ['FASTMED_DATA'])/'chest_xray'
    df = pd.read_csv(root/'labels.csv', dtype={'patient_id':str})
    df = df.assign(case=df.image, image='images/'+df.image, subject=df.patient_id,
            pneumonia=df.pneumonia.map({0:'no',1:'yes'}))
    df['test'] = test_subjects(df, 'subject')
    pool = df[~df.test].reset_index(drop=True)
    net = dict(arch='UNet', nf=16, depth=5)
    def loaders(d, label, **kw):
        return RadiographDataLoaders.from_df(d, root, label_col=label, size=96, bs=32, num_workers=0, device='cpu',
                                             **kw)
    if not (out/'chest_proxy.safetensors').exists():
        with quiet():
            set_seed(0)
            t0 = time.perf_counter()
            rest = restoration_learner(loaders(pool, 'sex', valid_pct=.1), **net)
            with rest.no_bar(), rest.no_logging(): rest.fit_one_cycle(a.pre, 3e-3)
            rest.save_encoder(out/'chest_restoration.safetensors')
            undone,took = rest.validate()[1],time.perf_counter()-t0
            set_seed(0)
            prox = classifier_learner(loaders(pool, 'sex', valid_pct=.1), **net)
            with prox.no_bar(), prox.no_logging(): prox.fit_one_cycle(a.pre, 3e-3)
            prox.save_encoder(out/'chest_proxy.safetensors')
        # `quiet` would swallow it
        print(f"restoration: {undone:.2f} of the damage undone, {took:.0f} s", flush=True)
    def make(d): return classifier_learner(loaders(d, 'pneumonia', valid_col='_held_out'), metrics=[], **net)
    return label_efficiency(df, a.chest_sizes, {'scratch':None, 'restoration':out/'chest_restoration.safetensors',
                                                'proxy: sex':out/'chest_proxy.safetensors'}, a.repeats, make,
                            dict(updates=a.chest_updates), 'test', stratify='pneumonia', path=out/'chest', lr_max=2e-3)

def hippocampus(a, out):
    "`LabelEfficiency` of the hippocampus"
    from fastmed.all import (
        VolumeDataLoaders,
        label_efficiency,
        load_weights,
        restoration_learner,
        scan_decathlon,
        set_seed,
        torch,
    )
    df = scan_decathlon(Path(os.environ['FASTMED_DATA'])/'hippocampus')
    df['test'] = test_subjects(df, 'subject')
    codes = ['background','anterior','posterior']
    # what is finished is not done again
    if not (out/'hippocampus_all.pth').exists():
        with quiet():
            set_seed(0)
            t0 = time.perf_counter()
            rest = restoration_learner(VolumeDataLoaders.from_df(df[~df.test], mask_col=None, valid_pct=.1,
                    num_workers=0, device='cpu'))
            with rest.no_bar(), rest.no_logging(): rest.fit_for(a.pre_minutes)
            rest.save_encoder(out/'hippocampus_restoration.safetensors')
            torch.save(rest.model.state_dict(), out/'hippocampus_all.pth')
            undone,took = rest.validate()[1],time.perf_counter()-t0
        # `quiet` would swallow it
        print(f"restoration: {undone:.2f} of the damage undone, {took:.0f} s", flush=True)
    def whole(learn): load_weights(learn.model, out/'hippocampus_all.pth')
    return label_efficiency(df, a.sizes,
                            {'scratch':None, 'restoration, encoder':out/'hippocampus_restoration.safetensors',
                            'restoration, all':whole}, a.repeats, None, dict(updates=a.updates), 'test',
                            path=out/'hippocampus', codes=codes, num_workers=0, device='cpu')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--what', nargs='+', default=['chest','hippocampus'], choices=['chest','hippocampus'])
    p.add_argument('--sizes', nargs='+', type=int, default=[5,10,20,40])
    p.add_argument('--updates', type=int, default=200)
    p.add_argument('--pre-minutes', type=float, default=8.)
    p.add_argument('--chest-sizes', nargs='+', type=int, default=[20,80,320])
    p.add_argument('--chest-updates', type=int, default=200)
    p.add_argument('--pre', type=int, default=15, help='epochs of the pretraining on radiographs')
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--runs', help='folder of the runs; give it to go on with what was stopped')
    a = p.parse_args()
    out = Path(a.runs or tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    import fastprogress
    fastprogress.fastprogress.NO_BAR = True
    for w in a.what:
        t0 = time.perf_counter()
        res = globals()[w](a, out)
        s = res.summary().assign(score_name=res.score)
        g = res.gain()
        s.merge(g.rename(columns=dict(low='gain_low', high='gain_high')), how='left',
                on=['init','subjects']).round(4).assign(updates=a.chest_updates if w=='chest'
                else a.updates).to_csv(here/f'label_efficiency_{w}.csv', index=False)
        fig = res.plot().figure
        fig.savefig(out/f'{w}.png', dpi=80, bbox_inches='tight')
        print(s.round(3).to_string(), g.round(3).to_string(), f'{(time.perf_counter()-t0)/60:.1f} min', sep='\n',
              flush=True)
