"""Every line of the table of bad inputs: the error, in one breath, with the words that help; nothing half-written, no
hang.

`BAD_INPUTS_CSV=benchmarks/bad_inputs.csv pytest tests/test_bad_inputs.py` keeps what each was told."""
import contextlib
import csv
import gzip
import io
import os
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from bad_inputs import BAD
from phantoms import CODES

import fastmed.all
from fastmed.cli import main
from fastmed.data.radiographs import RadiographPrep
from fastmed.metrics.scores import scores_interval
from fastmed.study.efficiency import thick_slices


@pytest.fixture
def world(study, learner, tmp_path):
    P,D = study
    T = tmp_path/'given'
    T.mkdir()
    def put(name, what, affine=None):
        if isinstance(what, bytes): (T/name).write_bytes(what)
        else: nib.save(nib.Nifti1Image(what, np.eye(4) if affine is None else affine), T/name)
        return T/name
    def huge(b): return b[:40]+struct.pack('<8h', 3, 30000, 30000, 30000, 1, 1, 1, 1)+b[56:]
    def flat(b): return b[:252]+struct.pack('<2h', 0, 1)+b[256:280]+bytes(48)+b[328:]          # an sform of noughts
    def png(a):
        from PIL import Image
        b = io.BytesIO()
        Image.fromarray(np.asarray(a).astype(np.uint8)).save(b, 'PNG')
        return b.getvalue()
    def exported(l):
        l.export('whole.pkl')
        return (l.path/'whole.pkl').read_bytes()
    def sh(*words):
        out,err = io.StringIO(),io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(o) for o in words])
        said = [o for o in err.getvalue().splitlines() if ' is opened as a pickle, ' not in o]    # before it is opened
        assert code==2 and len(said)==1, (code, err.getvalue())
        raise RuntimeError(err.getvalue())
    class World(dict):                                                    # Learners are made when a line asks for one
        def __missing__(self, k):
            if k in ('L3','L2'):
                self[k] = learner(int(k[1]))
                return self[k]
            raise KeyError(k)
    KL = dict(valid_pct=.25, spacing=1.25, bs=2, num_workers=0, device='cpu', cache=tmp_path/'cache')
    def DY(): return fastmed.all.VolumeDataLoaders.from_df(D.assign(y=['a','b']*4), P, label_col='y', **KL)
    names = {o.__name__:o for o in (RadiographPrep, scores_interval, thick_slices)}
    return World({**vars(fastmed.all), **names}, T=T, KL=KL, DY=DY, png=png, pd=fastmed.all.pd, P=P, D=D,
            IM=P/D.image[0], MA=P/D['mask'][0], t=fastmed.all.load_volume(P/D.image[0]), put=put, huge=huge, flat=flat,
                   exported=exported, sh=sh, np=np, nib=nib, gzip=gzip, torch=torch,
                 KW=dict(codes=CODES, valid_pct=.25, spacing=1.25, patch=16, bs=2, samples_per_case=2, num_workers=0,
                         device='cpu', cache=tmp_path/'cache'))

@pytest.mark.parametrize('what,code,kind,words', BAD, ids=[b[0] for b in BAD])
def test_bad_input(world, what, code, kind, words):
    with pytest.raises(kind) as e: eval(code, {}, world)
    msg = str(e.value)
    assert what.startswith(('shell','argument that nobody')) or isinstance(e.value,
                            fastmed.all.FastmedError), f'{what}: {type(e.value).__name__} is none of the family'
    assert words in msg, f'{what}: {msg}'
    if table:=os.environ.get('BAD_INPUTS_CSV'):
        for o in (world['T'],world['P']): msg = msg.replace(f'{o}/', '').replace(str(o), o.name)
        with open(table, 'a', newline='') as f:
            csv.writer(f).writerow((what, type(e.value).__name__, ' '.join(msg.split())))
    assert len(msg)<700, f'{what}: {len(msg)} characters'
    assert not [o for o in world['T'].rglob('*') if '.part' in o.name or 'tmp' in o.name], 'nothing half-written'

def test_the_table_is_long_enough(): assert len(BAD)>=60 and len({b[0] for b in BAD})==len(BAD)
