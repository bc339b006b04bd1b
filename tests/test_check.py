"The doctor: each kind of fault planted once is found, clean data raises nothing, leaks are named, sets are told apart."
import copy
import gzip
import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from phantoms import CODES, affine_of, python, write_case
from scipy.ndimage import gaussian_filter
from scipy.ndimage import shift as moved

from fastmed.core import FastmedError
from fastmed.data.cases import scan_decathlon, scan_folder
from fastmed.data.check import *
from fastmed.data.datasets import cohort, phantom
from fastmed.data.leaks import *
from fastmed.data.leaks import _quantum
from fastmed.data.oddities import *

N,BAD = 12,5    # cases of the study; the one that gets the fault

def make(i, shape=None, affine=None, gain=1.):
    "A phantom with a size, place, noise and gain of its own: image and mask"
    rng = np.random.default_rng(i)
    shape = tuple(rng.integers(22, 26, 3)) if shape is None else shape
    im,m = phantom(shape, affine_of('RAS', rng.uniform(.95, 1.05, 3), rng.uniform(-20, 20, 3)) if affine is None
                                    else affine, seed=i, radius=rng.uniform(5., 5.6))
    return nib.Nifti1Image(im.get_fdata(dtype=np.float32)*np.float32(gain*100*rng.uniform(.8, 1.2)), im.affine), m

@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    "Twelve sound cases of two channels: DataFrame"
    path,rows = tmp_path_factory.mktemp('healthy'),[]
    for i in range(N):
        im,m = make(i)
        fs = [path/f'c{i:02d}{s}.nii.gz' for s in ('','_b','_m')]
        second = nib.Nifti1Image((500-im.get_fdata(dtype=np.float32)+np.random.default_rng(100+i).normal(0, 5,
                im.shape)).astype(np.float32), im.affine)
        for x,f in zip((im, second, m), fs): nib.save(x, f)
        rows.append(dict(case=f'c{i:02d}', subject=f's{i}', image=fs[0], second=fs[1], mask=fs[2]))
    return pd.DataFrame(rows)

def rewrite(fn, to, data=lambda a: a, affine=None, dtype=None, header=None):
    im = nib.load(fn)
    a = data(np.asarray(im.dataobj).copy())
    new = nib.Nifti1Image(a if dtype is None else a.astype(dtype), im.affine if affine is None
                          else affine(im.affine.copy()))
    if header: header(new)
    nib.save(new, to)
    return to

def im(data=lambda a: a, **kw): return lambda r,p: r.update(image=rewrite(r['image'], p/'x.nii.gz', data, **kw))
def ma(data=lambda a: a, **kw): return lambda r,p: r.update(mask=rewrite(r['mask'], p/'m.nii.gz', data, **kw))
def both(data=lambda a: a, **kw): return lambda r,p: (im(data, **kw)(r,p), ma(data, **kw)(r,p))
def put(a, where, v):
    a[where] = v
    return a
def mul(v): return lambda A: A@np.diag([*v, 1.])
def move(v): return lambda A: put(A, (slice(0,3),3), A[:3,3]+v)
def turn(A):
    c,s = np.cos(.3),np.sin(.3)
    return np.array([[c,-s,0,0],[s,c,0,0],[0,0,1,0],[0,0,0,1.]])@A
def shear(A): return A@np.array([[1,.3,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1.]])
def raw(f, name='x.nii.gz'):
    return lambda r,p: ((p/name).write_bytes(f(r['image'].read_bytes())), r.update(image=p/name))
def second(f): return lambda r,p: r.update(image=[r['image'], f(r['second'], p/'s.nii.gz')])
def flip_qform(x):
    x.set_sform(x.affine, 1)
    x.set_qform(x.affine@np.diag([-1,1,1,1.]), 1)
def no_codes(x): x.set_sform(None), x.set_qform(None)
def qform_alone(x): x.set_qform(x.affine, 1), x.set_sform(None)
def huge(b):
    h = bytearray(gzip.decompress(b))
    h[42:48] = np.array([20000]*3, '<i2').tobytes()
    return gzip.compress(bytes(h))
def zero_affine(b):
    h = bytearray(gzip.decompress(b))
    h[280:328] = bytes(48)
    return gzip.compress(bytes(h))
def turned(fn, to):
    im = nib.load(fn).as_reoriented(nib.orientations.axcodes2ornt('LPS'))
    nib.save(im, to)
    return to
def odd_grid(**kw):
    return lambda r,p: [nib.save(o, p/f) or r.update({k:p/f}) for o,k,
            f in zip(make(3, **kw), ('image','mask'), ('x.nii.gz','m.nii.gz'))]

FAULTS = { # name: (kind that must be found, what is done to the case)
    'truncated .nii.gz': ('unreadable', raw(lambda b: b[:len(b)//2])),
    'truncated .nii': ('unreadable', raw(lambda b: gzip.decompress(b)[:9000], 'x.nii')),
    'not a scan': ('unreadable', raw(lambda b: b'hello'*100)),
    'empty file': ('unreadable', raw(lambda b: b'')),
    'checksum gone': ('unreadable', raw(lambda b: b[:-8])),
    'a bit changed': ('unreadable', raw(lambda b: b[:5000]+bytes([b[5000]^4])+b[5001:])),
    'no such file': ('missing file', lambda r,p: r.update(image=p/'gone.nii.gz')),
    'image without mask': ('no mask', lambda r,p: r.update(mask=None)),
    'mask without image': ('no image', lambda r,p: r.update(image=None)),
    'mask of another shape': ('mask shape', ma(lambda a: a[:-2])),
    'mask of another spacing': ('mask spacing', ma(affine=mul((1,1,1.2)))),
    'mask of another orientation': ('mask orientation', ma(affine=mul((-1,1,1)))),
    'mask of another direction': ('mask direction', ma(affine=turn)),
    'mask elsewhere': ('mask place', ma(affine=move((3,0,0)))),
    'mask with other axes, same place': ('mask turned', lambda r,p: r.update(mask=turned(r['mask'], p/'m.nii.gz'))),
    'two mask files': ('mask channels', lambda r,p: r.update(mask=[r['mask'], r['mask']])),
    'mask of two channels': ('mask channels', ma(lambda a: np.stack([a,a], -1))),
    'channel of another shape': ('channel shape', second(lambda f,t: rewrite(f, t, lambda a: a[:-2]))),
    'channel of another spacing': ('channel spacing', second(lambda f,t: rewrite(f, t, affine=mul((1,1,1.2))))),
    'channel of another orientation': ('channel orientation', second(lambda f,t: rewrite(f, t, affine=mul((-1,1,1))))),
    'channel of another direction': ('channel direction', second(lambda f,t: rewrite(f, t, affine=turn))),
    'channel elsewhere': ('channel place', second(lambda f,t: rewrite(f, t, affine=move((3,0,0))))),
    'channel with other axes, same place': ('channel turned', second(turned)),
    'one channel more': ('number of channels', lambda r,p: r.update(image=[r['image'], r['second']])),
    'channels in the wrong order': ('odd contrast', lambda r,p: r.update(image=r['second'])),
    'singular affine': ('singular affine', raw(zero_affine)),
    'skewed affine': ('skewed affine', both(affine=shear)),
    'header in metres': ('unit of length',
        im(affine=lambda A: np.diag([.001]*3+[1])@A, header=lambda x: x.header.set_xyzt_units('meter'))),
    'sform against qform': ('sform against qform', im(header=flip_qform)),
    'no form codes': ('no form codes', both(header=no_codes)),
    'too large': ('too large', raw(huge)),
    'unexpected label': ('unexpected label', ma(lambda a: put(a, (10,10,slice(8,12)), 7))),
    'missing label': ('missing label', ma(lambda a: np.where(a==2, 0, a).astype(np.uint8))),
    'label not whole': ('label not whole', ma(lambda a: a*np.float32(.5), dtype=np.float32)),
    'empty mask': ('empty mask', ma(lambda a: a*0)),
    'mask at the border': ('touches border', both(lambda a: a[9:])),
    'stray piece': ('stray pieces', ma(lambda a: put(a, (2,2,slice(2,4)), 1))),
    'NaN': ('NaN or Inf', im(lambda a: put(a, (3,4,5), np.nan))),
    'Inf': ('NaN or Inf', im(lambda a: put(a, (3,4,5), np.inf))),
    'all NaN': ('NaN or Inf', im(lambda a: a*np.nan)),
    'constant': ('constant', im(lambda a: a*0+3)),
    'nearly constant': ('nearly constant', im(lambda a: put(a*0, (3,4,5), 1))),
    'mask saved as image': ('looks like a mask', lambda r,p: r.update(image=r['mask'])),
    'thousand times brighter': ('intensity regime', im(lambda a: a*1000)),
    'offset': ('odd intensity', im(lambda a: a+np.float32(1024))),
    'other modality': ('odd contrast', im(lambda a: a.max()-a)),
    'noise': ('odd texture',
              im(lambda a: np.random.default_rng(0).normal(a.mean(), a.std(), a.shape).astype(np.float32))),
    'blurred': ('odd texture', im(lambda a: gaussian_filter(a, 2.))),
    'odd size': ('odd size', odd_grid(shape=(24,24,90))),
    'odd spacing': ('odd spacing', odd_grid(affine=affine_of('RAS', (1,1,5)))),
    'odd label volume': ('odd volume', ma(lambda a: a*(np.indices(a.shape)[0]<a.shape[0]//2-2).astype(np.uint8))),
    'other orientation': ('mixed orientation', lambda r,p: r.update(image=turned(r['image'], p/'x.nii.gz'),
        mask=turned(r['mask'], p/'m.nii.gz')))}

@pytest.fixture(scope='module')
def bent(tmp_path_factory):
    "Twenty-four subjects bent from one atlas: DataFrame"
    return cohort(tmp_path_factory.mktemp('bent'), n=24, spacing=4.)

@pytest.fixture
def few_trees(monkeypatch):
    "A small forest tells unlike sets apart as well; the notebook of the module grows the whole one"
    from sklearn.ensemble import ExtraTreesClassifier
    monkeypatch.setattr('sklearn.ensemble.ExtraTreesClassifier', lambda n, **kw: ExtraTreesClassifier(n//10, **kw))

@pytest.fixture
def one_survey(monkeypatch):
    "`find_leaks` reads each set of images once a test; subjects and folds do not change what is in them"
    from fastmed.data import leaks
    known,survey = {},leaks.survey_cases
    def surveyed(df, *args, **kwargs):
        key = tuple(df.image)
        if key not in known: known[key] = survey(df, *args, **kwargs)
        return copy.deepcopy(known[key])
    monkeypatch.setattr(leaks, 'survey_cases', surveyed)

def sick(df, what, path):
    "The study with one fault in one case"
    rows = df.to_dict('records')
    what(rows[BAD], path)
    return pd.DataFrame(rows).astype(object)

def test_clean_data_raises_nothing(healthy):
    for kw in (dict(), dict(codes=CODES), dict(image_col=['image','second'], codes=CODES)):
        assert not len(r:=check_dataset(healthy, **kw)), pd.DataFrame(r)[['case','problem','found']].to_string()
    assert check_dataset(healthy).answer()=='12 cases: nothing was found.' and not len(find_leaks(healthy)) and not len(
            find_leaks(healthy.drop(columns='subject')))

@pytest.mark.parametrize('name', FAULTS)
def test_planted_fault_is_found(healthy, tmp_path, name):
    "The fault is named with its case and file, no other case gets an error, and `clean` keeps all the others"
    problem,what = FAULTS[name]
    df = sick(healthy, what, tmp_path)
    r = check_dataset(df, CODES)
    got = pd.DataFrame(r)[r.problem==problem]
    assert (got.case==f'c{BAD:02d}').any(), pd.DataFrame(r)[['case','problem','found']].to_string()
    assert set(r.errors.case)<={f'c{BAD:02d}'} and set(r.case)<={f'c{BAD:02d}'}
    assert (got.expected!='').all() and (got.found!='').all() and (got.fix!='').all()
    assert len(r.clean())==N-bool(len(r.errors)) and (r.severity.isin(['error','warning'])).all()

def test_no_form_codes_names_every_such_file(healthy, tmp_path):
    """Image and mask agree, and yet neither header says where left is: each is named, and one code is enough to be
    silent"""
    df = sick(healthy, both(header=no_codes), tmp_path)
    r = check_dataset(df, CODES)
    got = pd.DataFrame(r)[r.problem=='no form codes']
    assert sorted(got.file)==sorted(str(tmp_path/o) for o in ('x.nii.gz','m.nii.gz'))
    assert set(got.severity)=={'warning'} and got.found.str.contains('LAS').all() and not len(r.errors)
    one_code = sick(healthy, both(header=qform_alone), tmp_path)
    assert 'no form codes' not in set(check_dataset(one_code, CODES).problem)

def test_every_kind_is_planted(healthy, tmp_path):
    "The table of problems and the faults of this file name the same kinds"
    own = {'mask does not lie on the image','case named twice','no volume','gantry tilt','missing slice',
           'channel order','rare label','labels not consecutive','same image','same mask','same mask, one subject'}
    assert {p for p,_ in FAULTS.values()} | own == {p[0] for p in PROBLEMS}

@pytest.fixture(scope='module')
def beside(tmp_path_factory):
    "Twelve scans of a structure that lies off the middle: DataFrame"
    path,rows = tmp_path_factory.mktemp('beside'),[]
    grid = np.stack(np.meshgrid(*[np.arange(32)]*3, indexing='ij'), -1)
    for i in range(12):
        rng = np.random.default_rng(i)
        lab = (((grid-rng.uniform((9,12,13), (11,14,15)))/(5,6,4))**2).sum(-1)<1
        image = gaussian_filter(rng.normal(0, 20, lab.shape), 1)+100*lab+2*grid[...,1]+50
        fs = path/f'c{i:02d}.nii.gz',path/f'c{i:02d}_m.nii.gz'
        for a,f in zip((image.astype(np.float32), lab.astype(np.uint8)), fs):
            nib.save(nib.Nifti1Image(a, affine_of('RAS', (1,1,1), (0,0,0))), f)
        rows.append(dict(case=f'c{i:02d}', subject=f's{i}', image=fs[0], mask=fs[1]))
    return pd.DataFrame(rows)

_OFF = 'mask does not lie on the image'

@pytest.mark.parametrize('change,place',
        [(lambda a: a[::-1], 'mirrored along x'), (lambda a: np.roll(a, -3, 1), 'moved by +3 voxels along y'),
                                          (lambda a: np.roll(a, 4, 2), 'moved by -4 voxels along z')])
def test_mask_off_its_image(beside, tmp_path, change, place):
    "A mask mirrored or shifted under an unchanged header gets one warning, its neighbours none"
    df = beside.copy().astype(object)
    df.at[BAD,'mask'] = rewrite(df.at[BAD,'mask'], tmp_path/'m.nii.gz', change)
    r = check_dataset(df)
    r = r[r.problem==_OFF]
    assert list(r.case)==['c05'] and list(r.severity)==['warning'] and place in r.found.iloc[0] and r.file.iloc[
            0].endswith('m.nii.gz')
    few = check_dataset(df.iloc[:7])
    assert _OFF not in set(few.problem)

def test_every_place_is_tried_as_if_the_mask_lay_there():
    "The profile at a place is that of the mask mirrored or moved there; outside of the image it is nan"
    from fastmed.data.oddities import _median, _placements, border_profiles
    rng = np.random.default_rng(0)
    lab = np.zeros((18,17,16), np.int32)
    lab[6:11,7:12,6:10],lab[2:6,7:11,7:10] = 1,2
    lab[6:8,7:9,6:8] = 0
    a = rng.normal(size=lab.shape).astype(np.float32)
    here = border_profiles(a, lab)
    for j,(_,shift,flip) in enumerate(_placements()):
        there = lab if flip is None else np.flip(lab, flip)
        pad = np.roll(np.pad(there, 6), shift, (0,1,2))
        if pad[6:-6,6:-6,6:-6].astype(bool).sum()<lab.astype(bool).sum(): continue           # partly outside
        moved = border_profiles(a, np.ascontiguousarray(pad[6:-6,6:-6,6:-6]))
        for k in (1,2): np.testing.assert_allclose(moved[k][0], here[k][j], atol=1e-6)
    assert np.isnan(here[2]).any() and not np.isnan(here[1][0]).any()
    x = np.where(rng.random((9,40))<.4, np.nan, rng.normal(size=(9,40)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n in range(1, 10): np.testing.assert_array_equal(_median(x[:n]), np.nanmedian(x[:n], 0))

def test_masks_on_their_images(beside, healthy, bent):
    "No false alarm on sound cases"
    for df in (beside, healthy, bent[:12]): assert _OFF not in set(check_dataset(df).problem)

def test_rounding_is_no_finding(healthy, tmp_path):
    df = sick(healthy,
              ma(affine=lambda A: A+1e-5*np.random.default_rng(0).uniform(-1, 1, (4,4))*np.array([[1]]*3+[[0]])),
              tmp_path)
    assert not len(check_dataset(df, CODES))

def test_twins(healthy, tmp_path):
    df = sick(healthy, lambda r,p: r.update(image=rewrite(healthy.image[2], p/'x.nii', dtype=np.float64),
            mask=rewrite(healthy['mask'][2], p/'m.nii')), tmp_path)
    r = check_dataset(df, CODES)
    assert list(r.problem)==['same image'] and r.case.iloc[0]=='c05' and 'c02' in r.found.iloc[0] and len(
            r.clean())==N-1
    for n,f in (('turned',lambda f,t: turned(f, t)), ('mirrored',lambda f,t: rewrite(f, t, lambda a: a[::-1]))):
        df = sick(healthy, lambda r,p: r.update(image=f(healthy.image[2], p/f'{n}.nii')), tmp_path)
        r = check_dataset(df)
        r = r[r.problem=='same image']
        assert list(r.case)==['c05'] and ('mirrored' in r.found.iloc[0])==(n
                =='mirrored') and 'another subject' in r.found.iloc[0]
    one = make(0)
    two = [nib.Nifti1Image(one[0].get_fdata(dtype=np.float32)+np.float32(k), one[0].affine) for k in (1,2)]
    for k,o in enumerate(two):
        nib.save(o, tmp_path/f't{k}.nii')
        nib.save(one[1], tmp_path/f'u{k}.nii')
    t = pd.DataFrame([dict(case=f't{k}', image=tmp_path/f't{k}.nii', mask=tmp_path/f'u{k}.nii', subject=s) for k,
            s in ((0,'a'),(1,'b'))])
    assert set(check_dataset(t).problem)=={'same mask'} and set(check_dataset(t.assign(subject='a')).problem)=={
            'same mask, one subject'}
    t = t.astype(object)
    t.loc[1,'image'] = None
    assert check_dataset(t).groupby('problem').case.agg(list).to_dict()=={'no image':['t1'],
            'same mask':['t1']}, 'the case that has its image is not blamed'

def test_labels_of_the_set(healthy, tmp_path):
    df = sick(healthy, FAULTS['unexpected label'][1], tmp_path)
    assert set(check_dataset(df).problem) >= {'rare label',
                                              'labels not consecutive'} and not len(check_dataset(df).errors)
    r = check_dataset(healthy, ['background','large','small','tail'])
    assert list(zip(r.case, r.problem))==[('(all)','missing label')] and len(r.clean())==N
    assert not len(check_dataset(healthy, dict(background=0, body=[1,2]))) and len(check_dataset(healthy,
            dict(background=0, body=[1])).errors)==N
    two = pd.concat([healthy, healthy.iloc[[3]]], ignore_index=True)
    r = check_dataset(two, CODES)
    assert 'case named twice' in set(r.problem) and len(r.clean())==N

def test_many_faults_at_once(healthy, tmp_path):
    rows = healthy.to_dict('records')
    for i,k in enumerate(['NaN','truncated .nii.gz','empty mask']):
        (d:=tmp_path/str(i)).mkdir()
        FAULTS[k][1](rows[i], d)
    r = check_dataset(pd.DataFrame(rows).astype(object), CODES)
    assert [set(r[r.case==f'c{i:02d}'].problem) for i in range(3)]==[{'NaN or Inf'},{'unreadable'},{'empty mask'}]
    assert list(r.clean().case)==[f'c{i:02d}' for i in range(2, N)] and 'c01' in r.clean().attrs['left_out']
    page = r.html(tmp_path/'r.html').read_text()
    assert 'c01' in page and 'data:image/png' in page and 'truncated' in page
    assert (r.summary().cases==1).all() and set(r.summary().columns)=={'severity','problem','cases','first_case',
            'found'}

def test_bad_arguments(healthy):
    for f,e in ((lambda: check_dataset(healthy[:0]), 'no rows'), (lambda: check_dataset(healthy, image_col='t1'), 't1'),
            (lambda: find_leaks(healthy, split='fold'), 'fold'), (lambda: distribution_shift(healthy[:3], healthy),
            'five')):
        with pytest.raises((ValueError,KeyError), match=e): f()

def test_memory_does_not_grow_with_cases(tmp_path):
    "Peak memory over 60 scans is that over 6, within a tenth"
    code = '''
import sys, resource, nibabel as nib, numpy as np, pandas as pd
from fastmed.data.check import check_dataset
p,n = sys.argv[1],int(sys.argv[2])
df = pd.DataFrame([dict(case=f'{k}', image=f'{p}/{k%6}.nii') for k in range(n)])
check_dataset(df[:6], workers=2); a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check_dataset(df, workers=2); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/a)'''
    rng = np.random.default_rng(0)
    for k in range(6):
        nib.save(nib.Nifti1Image(rng.normal(size=(96,96,96)).astype(np.float32), np.eye(4)), tmp_path/f'{k}.nii')
    assert float(python(code, tmp_path, 60).splitlines()[-1])<1.1

def test_channel_order(healthy):
    "One case of twelve has its channels the other way round, in each of several sets"
    rows = [dict(r, image=[r['image'],r['second']]) for r in healthy.to_dict('records')]
    assert not len(check_dataset(pd.DataFrame(rows)))
    for df in (rows, rows[3:8], rows[4:6]):
        df = [dict(r, image=r['image'][::-1]) if r['case']=='c05' else r for r in df]
        r = check_dataset(pd.DataFrame(df))
        o = r[r.problem=='channel order']
        assert len(o)==1 and 'c05' in o.case.iloc[0]+o.found.iloc[0]
    df = rows[:5]+[dict(rows[5], image=[healthy.image[5], 'gone.nii'])]
    r = check_dataset(pd.DataFrame(df))
    assert list(r.problem)==['missing file'], r.to_string()

def test_labels_that_one_case_has(healthy, tmp_path):
    "Declared or not, in few cases or many, the case is named"
    for n in (4,12):
        df = sick(healthy, FAULTS['unexpected label'][1], tmp_path).iloc[[BAD,*[i for i in range(N) if i!=BAD][:n-1]]]
        r = check_dataset(df)
        assert list(r[r.problem=='rare label'].case)==['c05'] and 'c05' in r[r.problem
                =='labels not consecutive'].found.iloc[0]

def test_what_most_cases_have_is_told_once(healthy, tmp_path):
    rows = healthy.to_dict('records')
    for i in range(8):
        (d:=tmp_path/str(i)).mkdir()
        FAULTS['mask at the border'][1](rows[i], d)
    r = check_dataset(pd.DataFrame(rows).astype(object))
    o = r[r.problem=='touches border']
    assert list(o.case)==['(all)'] and '8 of 12' in o.found.iloc[0]

def test_odd_tables(healthy, tmp_path, monkeypatch):
    """One case, names with umlauts and spaces, relative paths, empty cells of every kind, threads, nothing readable: an
    answer or an error of ours"""
    one = healthy.iloc[[0]]
    assert not len(check_dataset(one)) and not len(find_leaks(one)) and not len(
            check_dataset(one.drop(columns=['case','subject','mask'])))
    (d:=tmp_path/'Köpfe und Füße').mkdir()
    rows = []
    for i in range(6):
        rows.append(dict(case=f'Größe {i} ä',
                image=rewrite(healthy.image[i], d/f'bild {i} ü.nii.gz').relative_to(tmp_path),
                mask=str(rewrite(healthy['mask'][i], d/f'maske {i}.nii').relative_to(tmp_path))))
    df = pd.DataFrame(rows).astype(object)
    for w in (0,1,2):
        assert not len(check_dataset(df, CODES, path=tmp_path, workers=w)) and not len(find_leaks(df, tmp_path,
                workers=w))
    assert set(check_dataset(df, CODES).problem)=={'missing file'} and not len(find_leaks(df))
    monkeypatch.chdir(tmp_path)
    assert not len(check_dataset(df, CODES))
    for v in (None, np.nan, pd.NA, '', []):
        r = check_dataset(df.assign(mask=[v if i==3 else o for i,o in enumerate(df['mask'])]))
        assert list(zip(r.case, r.problem))==[('Größe 3 ä','no mask')]
    assert set(check_dataset(df.assign(mask=None)).problem)=={'no mask'} and set(
            check_dataset(df.assign(image=None)).problem)=={'no image'} and not len(check_dataset(df, mask_col='none'))
    for f in (check_dataset, find_leaks):
        for bad in (df.iloc[:0], pd.DataFrame(), df.drop(columns='image'), df.assign(image=5),
                                                         df.assign(image=[object()]*6)):
            with pytest.raises(FastmedError): f(bad)
        with pytest.raises(FastmedError): f(df, memory_gb=-1)
    page = check_dataset(df.assign(mask=None)).html(tmp_path/'r.html').read_text()
    assert 'Größe 3 ä' in page and str(tmp_path) not in page

def test_strange_sets(tmp_path, few_trees):
    "All constant, all unreadable, four axes, headers that promise too much, binary images"
    def write(name, *arrays, dtype=np.float32):
        rows = []
        for i,a in enumerate(arrays):
            nib.save(nib.Nifti1Image(a.astype(dtype), np.eye(4)), fn:=tmp_path/f'{name}{i}.nii.gz')
            rows.append(dict(case=f'{name}{i}', image=fn))
        return pd.DataFrame(rows)
    rng = np.random.default_rng(0)
    df = write('flat', *[np.full((8,8,8), i) for i in range(6)])
    r = check_dataset(df)
    assert set(r.problem)=={'constant'} and len(r)==6 and not len(find_leaks(df)) and not len(r.clean())
    r.html(tmp_path/'f.html')
    junk = [dict(case=f'{i}', image=tmp_path/f'{i}.nii') for i in range(6)]
    for o in junk: o['image'].write_bytes(rng.bytes(500))
    df = pd.DataFrame(junk)
    r = check_dataset(df)
    assert set(r.problem)=={'unreadable'} and len(r)==6 and not len(find_leaks(df))
    r.show()
    with pytest.raises(FastmedError, match='5|five'): distribution_shift(df, df)
    df = write('four', *[rng.normal(size=(9,8,7,3)) for _ in range(6)])
    assert not len(check_dataset(df)) and not len(find_leaks(df))
    assert 'intensity' in distribution_shift(df, df).index
    df = write('five', *[rng.normal(size=(4,4,4,2,2)) for _ in range(2)])
    assert set(check_dataset(df).problem)=={'no volume'}
    df = write('shape', *[rng.random((12,12,12))>.5 for _ in range(8)], dtype=np.uint8)
    assert not len(check_dataset(df)) and not len(find_leaks(df))
    for i,shape in enumerate(((30000,30000,30000),(32767,1,1),(0,5,5),(-5,5,5))):
        h = bytearray(gzip.decompress(df.image[0].read_bytes()))
        h[42:48] = np.array(shape, '<i2').tobytes()
        (tmp_path/f'huge{i}.nii').write_bytes(bytes(h))
    r = check_dataset(pd.DataFrame([dict(case=f'h{i}', image=tmp_path/f'huge{i}.nii') for i in range(4)]))
    assert set(r.errors.case)=={'h0','h1','h2','h3'}, r.to_string()

def test_the_split_of_dataloaders_warns(healthy, tmp_path):
    from fastmed.data.blocks import warn_twins
    twin = rewrite(healthy.image[2], tmp_path/'x.nii.gz')
    files = list(healthy.image)
    files[5] = twin
    with pytest.warns(UserWarning, match="'c02'.*'c05'"): warn_twins(healthy, files, range(5))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_twins(healthy, files, range(6))
        warn_twins(healthy, list(healthy.image), range(5))

# ---- leaks

def scans(path, f, n=6):
    "Unlike scans of smooth noise and a last one made from the first by `f`: DataFrame"
    from scipy.ndimage import gaussian_filter
    rows,A = [],[]
    for i in range(n):
        rng = np.random.default_rng(i)
        a = gaussian_filter(rng.normal(size=(32,30,28)), 3)*2000+1000+rng.normal(0, 8, (32,30,28))
        A.append(a.astype(np.float32))
    A[0],last = f(A[0])
    A.append(last)
    for i,a in enumerate(A):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(a), np.eye(4)), path/f'{i}.nii')
        rows.append(dict(case=f'{i}', subject=f's{i}', image=path/f'{i}.nii', side=i<n))
    return pd.DataFrame(rows)

LEAKS = dict(identical=('identical', lambda a: (a, a)), mirrored=('mirrored or turned', lambda a: (a, a[::-1])),
        turned=('mirrored or turned', lambda a: (a, a.transpose(2,0,1)[:,::-1])),
    overlapping=('shared pieces', lambda a: (a[:20], a[12:])),
        mirrored_overlap=('shared pieces', lambda a: (a[:20], a[12:,::-1,::-1])),
    quantum=('same quantum', lambda a: ((q:=np.round(a/5.958862)*np.float32(5.958862))[:16], q[16:])),
        gaps=('same gaps', lambda a: ((q:=np.round(np.round(a/7.3)*7.3/4))[:16], q[16:])),
    half_voxel=('same picture', lambda a: (a, moved(a, .5, order=1, mode='nearest'))),
    picture=('same picture', lambda a: (a, a*.37+55+np.random.default_rng(9).normal(0, 1, a.shape).astype(np.float32))),
        picture_mirrored=('same picture mirrored',
                          lambda a: (a, a[::-1]*.37+np.random.default_rng(9).normal(0, 1, a.shape).astype(np.float32))))

@pytest.mark.parametrize('name', LEAKS)
def test_leak_is_found(tmp_path, name):
    why,f = LEAKS[name]
    df = scans(tmp_path, f)
    got = find_leaks(df)
    sure = 'likely' if name in ('quantum','gaps','picture','picture_mirrored','half_voxel') else 'proved'
    assert [(r.case_a, r.case_b, r.sure) for r in got.itertuples()]==[('0','6',
            sure)] and why in got.evidence.iloc[0], got.to_string()
    assert not len(find_leaks(df.assign(subject=['s0','1','2','3','4','5',
                                                 's0']))), 'two scans of one subject are no leak'
    with pytest.warns(UserWarning, match='parts 1 pairs'): assert find_leaks(df, split='side').parted.all()

def strangers(path, f, n=24):
    "Scans of unlike subjects, each processed by `f`: DataFrame"
    rows = []
    for i in range(n):
        rng = np.random.default_rng(500+i)
        a = gaussian_filter(rng.normal(size=(30,28,26)), rng.uniform(1.5, 4))*rng.uniform(800, 4000)
        a = f(a+rng.uniform(500, 1500)+rng.normal(0, rng.uniform(2, 40), a.shape), i)
        nib.save(nib.Nifti1Image(a.astype(np.float32), np.eye(4)), fn:=path/f'{i}.nii')
        rows.append(dict(case=f'{i}', image=fn))
    return pd.DataFrame(rows)

def eighths(a, i):
    "Three of the strangers are stored as k/255, as 8-bit pictures are after a division"
    return np.round((a-a.min())/np.ptp(a)*255)/255 if i<3 else a

def ranks(a, i):
    "All with one histogram, as histogram matching makes them: the same values in other places"
    return np.argsort(np.argsort(a.ravel())).reshape(a.shape)*.37+1

@pytest.mark.parametrize('f', [eighths, ranks])
def test_steps_of_normalisation_prove_nothing(tmp_path, f):
    "Three strangers stored as k/255 were called proved; so were those with one histogram"
    got = find_leaks(strangers(tmp_path, f))
    assert not (got.sure=='proved').any(), got.to_string()
    assert not got.evidence.str.contains('quantum|gaps|voxels').any(), got.to_string()

def test_a_step_that_three_share_names_the_nearest_alone(tmp_path):
    "Two halves of one scan, and a stranger whose grey values have the same step: he was proved to be both"
    def f(a, i):
        q = np.float32(8.791449) if i<2 else np.float32(5+i/7)
        return np.round(a/q).astype(np.float32)*q
    df = strangers(tmp_path, f)
    a = np.asarray(nib.load(df.image[0]).dataobj)
    steps = np.round(a/8.791449)
    steps[1:] += np.random.default_rng(0).integers(-1, 2, a[1:].shape)
    for k,part in enumerate((a[:-1], (steps*8.791449)[1:])):
        nib.save(nib.Nifti1Image(part.astype(np.float32), np.eye(4)), fn:=tmp_path/f'part{k}.nii')
        df.loc[len(df)] = dict(case=f'part{k}', image=fn)
    got = find_leaks(df.drop(index=0), likely=False)
    assert list(zip(got.case_a, got.case_b))==[('part0','part1')] and (got.sure=='likely').all(), got.to_string()

def test_leak_in_any_channel(tmp_path):
    "Only the second channel gives the pair away; and a file that stands once as first and once as second channel"
    df = scans(tmp_path, lambda a: (a, np.random.default_rng(77).normal(1000, 50, a.shape).astype(np.float32)))
    (tmp_path/'b').mkdir()
    two = scans(tmp_path/'b', lambda a: (a, a[::-1]))
    both = df.assign(image=[list(o) for o in zip(df.image, two.image)])
    got = find_leaks(both)
    assert list(zip(got.case_a, got.case_b))==[('0','6')] and 'mirrored' in got.evidence.iloc[0]
    both['image'] = [*both.image[:6], [df.image[6], df.image[3]]]
    assert ('3','6') in set(zip(*find_leaks(both)[['case_a','case_b']].values.T))
    assert len(find_leaks(both.assign(image=[o if i else o[:1] for i,
                                             o in enumerate(
            both.image)])))==1, 'cases may have unlike numbers of channels'

def test_likeness_is_learnt_from_proved_pairs(tmp_path):
    """Ladders of some pairs teach what two halves of one scan share; pairs without a ladder are then found, and no
    others"""
    rows,rng = [],np.random.default_rng(0)
    for i in range(40):
        a = gaussian_filter(rng.normal(size=(48,24,24)), rng.uniform(1, 3))*rng.uniform(800, 4000)+rng.uniform(500,
                1500)+rng.normal(0, rng.uniform(2, 60), (48,24,24))
        if i<30:
            q = np.float32(round(rng.uniform(3, 9), 5))
            a = np.round(a/q).astype(np.float32)*q
        for k,x in enumerate((a[:24], a[24:])):
            if k and i%2: continue
            nib.save(nib.Nifti1Image(x.astype(np.float32), np.eye(4)), fn:=tmp_path/f'{i}_{k}.nii')
            rows.append(dict(case=f'{i}_{k}', image=fn))
    got = find_leaks(pd.DataFrame(rows))
    true = got.case_a.str.split('_').str[0]==got.case_b.str.split('_').str[0]
    free = got[got.case_a.str.split('_').str[0].astype(int)>=30]
    assert true.mean()>.9 and got.evidence.str.contains('quantum').sum()>=15 and len(free)>=4
    assert free.evidence.str.contains('alike, as the pairs with').all() and (got.sure=='likely').all(), got.to_string()

def test_no_leak_among_unlike(tmp_path):
    assert not len(find_leaks(scans(tmp_path,
                                    lambda a: (a,
                                               np.random.default_rng(77).normal(1000, 50,
            a.shape).astype(np.float32)))))

def test_no_leak_in_the_cohort(bent):
    "They are alike, and yet not one scan"
    got = find_leaks(bent)
    assert not len(got), got.to_string()
    r = check_dataset(bent, ['air','CSF','grey','white'], image_col=['image','image_t2'])
    assert not len(r.errors), r.errors.to_string()

def test_quantum():
    for q in (.25, 5.958862, 2653.4375):
        u = np.unique(np.random.default_rng(0).integers(3, 900, 300)).astype(np.float32)*np.float32(q)
        assert abs(_quantum(u)/q-1)<1e-6
    assert np.isnan(_quantum(np.sort(np.random.default_rng(0).normal(size=500)).astype(np.float32)))

# ---- shift

def test_shift(tmp_path, few_trees):
    from scipy.ndimage import gaussian_filter
    def study(name, n, seed, noise=8, spacing=1., site='a'):
        rows = []
        for i in range(n):
            rng = np.random.default_rng(seed+i)
            a = gaussian_filter(rng.normal(size=(24,24,24)), 2)*2000+1000+rng.normal(0, noise, (24,24,24))
            nib.save(nib.Nifti1Image(a.astype(np.float32), np.diag([spacing*rng.uniform(.98,1.02)]*3+[1])),
                     fn:=tmp_path/f'{name}{i}.nii')
            rows.append(dict(case=f'{name}{i}', image=fn, site=site))
        return pd.DataFrame(rows)
    a = study('a', 20, 0)
    same,noisy,coarse = study('b', 20, 100),study('c', 20, 200, noise=40),study('d', 20, 300, spacing=1.3, site='b')
    t = distribution_shift(a, same)
    assert set(t.index)=={'all','intensity','spacing','size','site'} and t.index[0]=='all'
    assert (t.low<=.5).all() and .2<t.auc['all']<.8 and t.auc['site']==.5
    t = distribution_shift(a, noisy)
    assert t.p['all']<.01 and t.low['all']>.85 and t.low['intensity']>.85
    assert t.low['spacing']<.5<t.high['spacing'] and 'along' in t.telling['intensity']
    t = distribution_shift(a, coarse)
    assert (t.auc[['all','spacing','size','site']]>.95).all() and 1.25<t.b['spacing']<1.35
    pd.testing.assert_frame_equal(t, distribution_shift(a, coarse))

# ---- real scans

@pytest.mark.slow
def test_hippocampus_as_downloaded(data, tmp_path):
    for s in ('hippocampus','hippocampus_stray'):
        for d in ('imagesTr','labelsTr'):
            (tmp_path/d).mkdir(exist_ok=True)
            for f in (data/s/d).glob('*.nii.gz') if (data/s/d).exists() else []: (tmp_path/d/f.name).symlink_to(f)
    df = scan_folder(tmp_path, 'imagesTr/*.nii.gz', 'labelsTr/*.nii.gz')
    r = check_dataset(df, ['background','Anterior','Posterior'])
    e = r.errors.groupby('case').problem.agg(set).to_dict()
    assert {k[-3:]:v for k,v in e.items()}=={'118':{'no mask'}, '281':{'no image'}, '010':{'no image'}}
    assert ({'odd size','odd spacing'} <= set(r[r.case=='hippocampus_281'].problem)
            and 'intensity regime' in set(r.problem) and len(r.clean())==len(df)-3)
    assert not len(check_dataset(scan_decathlon(data/'hippocampus')).errors)

def test_hippocampus_leaks(data, one_survey):
    df = scan_decathlon(data/'hippocampus')
    s = df.set_index('case').subject
    pairs = len(df)-s.nunique()
    t = find_leaks(df.drop(columns='subject'))
    true = s[t.case_a].values==s[t.case_b].values
    assert true.mean()>.98 and true.sum()>.95*pairs and true[t.sure=='proved'].all(), (true.mean(),
                                                             true.sum()/pairs)
    assert len(find_leaks(df))==(~true).sum()
    with pytest.warns(UserWarning, match='parts'):
        find_leaks(df.drop(columns='subject').assign(fold=np.arange(len(df))%2), split='fold')

@pytest.mark.slow
def test_lesions_on_a_fine_grid(data):
    df = scan_folder(data/'ms_lesions')
    assert not len(check_dataset(df)) and not len(find_leaks(df))

def test_other_real_sets(data):
    ixi = scan_folder(data/'ixi_brains')
    assert not len(check_dataset(ixi).errors) and not len(find_leaks(ixi))
    ct = pd.DataFrame([dict(case=o.name, image=o) for o in sorted((data/'ct_dicom').iterdir())])
    r = check_dataset(ct)
    assert r.groupby('case').problem.agg(list).to_dict()=={o:['gantry tilt' if 'tilt18' in o else 'no volume']
                                                           for o in ct.case if 'tilt18' in o or 'mixed' in o}
    sp = data/'spine'
    df = pd.DataFrame([dict(case=c, image=sp/f'{c}.nii.gz', mask=sp/m) for c,
            m in (('t1','t1_cord.nii.gz'),('t2','t2_cord.nii.gz'),('t2s','t2s_greymatter.nii.gz'),
            ('mt1','mt1_cord.nii.gz'))])
    r = check_dataset(df)
    assert not len(r.errors) and set(r.problem)=={'mixed orientation','touches border'}

def test_a_set_does_not_differ_from_itself(tmp_path, few_trees):
    "The twin of a case stood among those that the trees were grown on: AUC 0.0"
    from fastmed.data.oddities import distribution_shift
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(6)])
    assert (distribution_shift(df, df.assign(case='z'+df.case), tmp_path).auc==.5).all()
