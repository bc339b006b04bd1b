"Many cases: nobody's scans are merged, few files are open at a time, and nothing is read or held twice."
import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import forked
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from fastmed.core import FileError, InputError, ResourceError
from fastmed.data import leaks, plan, preprocess, recipe, store, survey
from fastmed.data import loaders as data
from fastmed.data.cases import scan_decathlon, scan_folder
from fastmed.data.check import check_dataset
from fastmed.data.preprocess import Preprocess
from fastmed.data.store import Store
from fastmed.io import volumes as io
from fastmed.io.guard import reading
from fastmed.io.volumes import load_volume

# --- which files make a case

def touch(path, *names):
    for n in names:
        (path/n).parent.mkdir(parents=True, exist_ok=True)
        (path/n).touch()
    return path

def pairs(df, path):
    "{case: (names of the images, name of the mask)} below `path`"
    def name(o): return None if o is None else str(o.relative_to(path))
    return {r.case:([name(o) for o in (r.image if isinstance(r.image, list) else [r.image])], name(r['mask'])) for _,
            r in df.iterrows()}

def test_patients_of_two_sites_are_two_cases(tmp_path):
    p = touch(tmp_path, *[f'site{s}/{k}/p0.nii.gz' for s in 'ab' for k in ('images','labels')])
    for images,masks in (('site*/images/*.nii.gz','site*/labels/*.nii.gz'),
            ('**/images/*.nii.gz','**/labels/*.nii.gz')):
        assert pairs(scan_folder(p, images, masks), p)=={f'site{s}_p0':([f'site{s}/images/p0.nii.gz'],
                                                         f'site{s}/labels/p0.nii.gz') for s in 'ab'}
    assert scan_folder(p, 'site*/images/*.nii.gz', None).case.tolist()==['sitea_p0','siteb_p0']

def test_a_mask_of_another_site_is_no_mask_of_this_patient(tmp_path):
    p = touch(tmp_path, 'a/images/p0.nii.gz', 'b/labels/p0.nii.gz', 'b/images/p1.nii.gz', 'b/labels/p1.nii.gz')
    t = pairs(scan_folder(p, '*/images/*.nii.gz', '*/labels/*.nii.gz'), p)
    assert t['a_p0'][1] is None and t['b_p1']==(['b/images/p1.nii.gz'], 'b/labels/p1.nii.gz')

def test_folders_that_do_not_tell_masks_apart_are_refused_by_name(tmp_path):
    p = touch(tmp_path, 'a/images/p0.nii.gz', 'b/images/p0.nii.gz', 'labels/p0.nii.gz')
    with pytest.raises(InputError) as e: scan_folder(p, '*/images/*.nii.gz')
    assert all(str(p/o) in str(e.value) for o in ('a/images/p0.nii.gz','b/images/p0.nii.gz'))

def test_one_folder_a_case(tmp_path):
    p = touch(tmp_path, *[f'{n}/{f}.nii.gz' for n in ('anna','bert') for f in ('image','mask')])
    assert pairs(scan_folder(p, '*/image.nii.gz', '*/mask.nii.gz'), p)=={n:([f'{n}/image.nii.gz'], f'{n}/mask.nii.gz')
            for n in ('anna','bert')}
    assert scan_folder(p, '*/image.nii.gz', None).case.tolist()==['anna','bert']

def test_channels_lie_in_one_folder(tmp_path):
    p = touch(tmp_path, *[f'{n}/{f}.nii.gz' for n in ('anna','bert') for f in ('scan_0000','scan_0001','mask')])
    assert pairs(scan_folder(p, '*/scan_*.nii.gz', '*/mask.nii.gz'),
            p)=={n:([f'{n}/scan_0000.nii.gz',f'{n}/scan_0001.nii.gz'], f'{n}/mask.nii.gz') for n in ('anna','bert')}

def test_bids(tmp_path):
    names = [f'sub-0{k}/ses-1/anat/sub-0{k}_ses-1_T1w.nii.gz' for k in (1,2)]
    p = touch(tmp_path, *names, *[f'derivatives/seg/{o}' for o in names])
    t = scan_folder(p, 'sub-*/ses-*/anat/*_T1w.nii.gz', 'derivatives/seg/sub-*/ses-*/anat/*.nii.gz')
    assert pairs(t, p)=={f'sub-0{k}_ses-1_T1w':([o], f'derivatives/seg/{o}') for k,o in zip((1,2), names)}

def test_two_hundred_numbered_scans_are_not_the_channels_of_one(tmp_path):
    p = touch(tmp_path, *[f'images/case_{k:04d}.nii.gz' for k in range(200)])
    with pytest.raises(InputError) as e: scan_folder(p, masks=None)
    assert str(p/'images/case_0000.nii.gz') in str(e.value) and 'channels=1' in str(e.value)
    assert len(scan_folder(p, masks=None, channels=1))==200 and len(scan_folder(p, masks=None,
            channels=200).image[0])==200
    touch(p, 'labels/case_0003.nii.gz')
    assert len(scan_folder(p))==200, 'one mask says that the numbers are those of scans'

def test_many_channels_that_are_declared(tmp_path):
    p = touch(tmp_path, *[f'images/a_{k:04d}.nii.gz' for k in range(12)])
    (p/'dataset.json').write_text(json.dumps(dict(channel_names={str(k):f'echo {k}' for k in range(12)})))
    assert len(scan_folder(p, masks=None).image[0])==12
    with pytest.raises(InputError, match='expected 11'): scan_folder(p, masks=None, channels=11)

@pytest.mark.parametrize('names', [('a.nii','a.nii.gz'), ('a.nii.gz','a_0000.nii.gz')])
def test_two_files_of_one_name_are_refused_by_name(tmp_path, names):
    p = touch(tmp_path, *[f'images/{o}' for o in names])
    with pytest.raises(InputError) as e: scan_folder(p, 'images/*', None)
    assert all(str(p/'images'/o) in str(e.value) for o in names)
    q = touch(tmp_path/'q', 'images/a.nii.gz', *[f'labels/{o}' for o in ('a.nii','a.nii.gz')])
    with pytest.raises(InputError, match="called 'a'"): scan_folder(q, masks='labels/*')

def test_a_decathlon_case_has_no_more_files_than_modalities(tmp_path):
    p = touch(tmp_path, *[f'imagesTr/a_{k:04d}.nii.gz' for k in range(3)], 'labelsTr/a.nii.gz')
    info = dict(labels={'0':'background','1':'x'},
            training=[dict(image='imagesTr/a.nii.gz', label='labelsTr/a.nii.gz')])
    for modality,ok in (({'0':'T1','1':'T2','2':'PD'}, True), ({'0':'T1'}, False)):
        (p/'dataset.json').write_text(json.dumps(dict(info, modality=modality)))
        if ok: assert len(scan_decathlon(p).image[0])==3
        else:
            with pytest.raises(InputError, match='a_0000'): scan_decathlon(p)

def test_a_header_and_its_voxels_are_one_case(tmp_path):
    p = touch(tmp_path, 'images/a.hdr', 'images/a.img')
    assert [o.name for o in scan_folder(p, 'images/*', None).image]==['a.hdr']

# --- how many files are open

def small_study(path, n, size=12):
    "`n` small scans with masks in images/ and labels/"
    rng = np.random.default_rng(0)
    for k in ('images','labels'): (path/k).mkdir(parents=True)
    for i in range(n):
        mask = np.zeros((size,)*3, np.uint8)
        mask[2:6+i%4,3:8,2:7] = 1
        a = (rng.standard_normal(mask.shape)*20+100+80*mask).astype(np.float32)
        for k,o in (('images',a), ('labels',mask)): nib.save(nib.Nifti1Image(o, np.eye(4)), path/k/f'c{i:04d}.nii')
    return scan_folder(path, 'images/*.nii', 'labels/*.nii')

def descriptors(): return len(os.listdir('/proc/self/fd'))

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts the descriptors that Linux lists')
def test_entries_that_stay_open_hold_no_descriptor(tmp_path):
    df = small_study(tmp_path, 12)
    store = Store(Preprocess(), tmp_path/'store').build(list(df.image), list(df['mask']))
    was = descriptors()
    held = [f(o) for f,col in ((store.image,'image'), (store.mask,'mask')) for o in df[col]]
    assert descriptors()==was and len(store._open)==24
    for t,o in zip(held, df.image):
        t[:] = 7                                                         # stays private
        assert torch.equal(Store(Preprocess(), tmp_path/'store').image(o).as_subclass(torch.Tensor),
                                 Preprocess()(load_volume(o)).as_subclass(torch.Tensor))

@pytest.mark.parametrize('a', [np.arange(24, dtype=np.float32).reshape(1,2,3,4),
                         np.asfortranarray(np.arange(24, dtype=np.float32).reshape(1,2,3,4)),
                         np.arange(24, dtype=np.uint8).reshape(2,3,4), np.arange(24, dtype=np.int16).reshape(2,3,4)])
def test_a_map_gives_what_numpy_wrote(tmp_path, a):
    from fastmed.data.store import _mapped
    np.save(tmp_path/'a.npy', a)
    t = _mapped(tmp_path/'a.npy')
    assert t.dtype==torch.from_numpy(a).dtype and np.array_equal(t.numpy(), a)
    whole = (tmp_path/'a.npy').read_bytes()
    for bad in (whole[:-1], whole+b'x', whole[:40], b'\x93NUMPY\x07\x00'+whole[8:]):
        (tmp_path/'a.npy').write_bytes(bad)
        with pytest.raises((ValueError,KeyError)): _mapped(tmp_path/'a.npy')

def test_too_many_open_files_are_no_fault_of_the_file():
    with pytest.raises(ResourceError, match='scan.nii.*as many files open as it may.*ulimit -n'):
        with reading('scan.nii'): raise OSError(errno.EMFILE, 'Too many open files')
    with pytest.raises(FileError, match='truncated'):
        with reading('scan.nii'): raise OSError(errno.EIO, 'read error')

# --- leaks, in blocks

def prints(n, seed=0, size=20, runs=512):
    """What `find_leaks` knows of `n` cases, with ten pairs that are one picture, ten with the same gaps and ten merely
    alike"""
    rng = np.random.default_rng(seed)
    def one(i):
        gaps = rng.random(300)<.2
        gaps[[0,-1]] = False
        thumb = rng.standard_normal((size,)*3).astype(np.float16)
        like = rng.standard_normal(49).astype(np.float32)
        return dict(sketch=rng.integers(0, 2**63, runs, dtype=np.uint64), quantum=np.nan,
                    gaps=(int(rng.integers(0, 40)),300,np.packbits(gaps)) if i%2 else None, thumb=thumb, like=like)
    res = [one(i) for i in range(n)]
    for k in range(10):
        res[k]['thumb'] = res[n-1-k]['thumb'][::-1] if k%2 else res[n-1-k]['thumb']
        res[20+k]['gaps'] = res[n-21-k]['gaps'] = res[21]['gaps'][0],300,np.packbits(rng.random(300)<.2)
        res[40+k].update(thumb=(res[n-41-k]['thumb']+.2*rng.standard_normal((size,)*3)).astype(np.float16),
                like=res[n-41-k]['like']+np.float32(.01))
    return [dict(channels=[], prints=[p]) for p in res]

def test_leaks_in_blocks_are_those_of_the_whole(monkeypatch):
    vox = prints(150)
    proof,like = leaks._pairs(vox)
    assert len(proof)>=20 and like
    monkeypatch.setattr(leaks, '_block_size', 37)
    assert leaks._pairs(vox)==(proof,like) and [list(o) for o in leaks._pairs(vox)]==[list(proof),list(like)]

@pytest.mark.parametrize('taught', [False, True])
def test_leaks_hold_no_matrix_of_all_pairs(monkeypatch, taught):
    "Three times as many cases take three times the memory, not nine"
    monkeypatch.setattr(leaks, '_block_size', 32, raising=False)
    monkeypatch.setattr(leaks, '_sample_size', 64, raising=False)
    def peak(n):
        vox = prints(n, size=4, runs=8)
        for k in range(20 if taught else 0):
            for i in (60+k, 100+k):
                vox[i]['prints'][0]['gaps'] = 0,300,np.packbits(np.random.default_rng(k).random(300)<.2)
        tracemalloc.start()
        try:
            leaks._pairs(vox)
            return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    assert peak(720)<4.5*peak(240)

# --- labels, each within its box

def test_a_hundred_labels_are_resampled_within_their_boxes(monkeypatch):
    a = np.zeros((40,40,40), np.uint8)
    for k in range(1, 100): a[k%10*4:k%10*4+3,k//10*4:k//10*4+3,10:13] = k
    T,shifted = (np.diag([.7,.9,1.1,1.]) for _ in range(2))
    shifted[:3,3] = 1e-3,1e-3,-1e-3                          # where new voxels lie halfway, one side has them
    want,best = np.zeros((57,44,36), np.uint8),np.zeros((57,44,36), np.float32)
    for v in np.unique(a):
        p = io._resample((a==v).astype(np.float32), shifted, want.shape, 'linear')
        want[p>best],best = v,np.maximum(p, best)
    seen,real = [],io._resample
    monkeypatch.setattr(io, '_resample', lambda o, *args: seen.append(o.size) or real(o, *args))
    assert np.array_equal(io._resample_labels(a, T, want.shape), want)
    assert sum(seen)<2*a.size, 'of the background all, of a label its box'
    wide = np.array([-7,0,3,70_000], np.int32)[a%4]
    assert set(np.unique(io._resample_labels(wide, T, want.shape)))<={-7,0,3,70_000}

# --- headers

@pytest.mark.parametrize('labelled', [False, True])
def test_from_df_reads_each_header_once(tmp_path, monkeypatch, labelled):
    df = small_study(tmp_path, 8).assign(label=['a','b']*4)
    read,real = [],io.read_header
    def counted(fn):
        if not isinstance(fn, list): read.append(str(fn))
        return real(fn)
    for m in (io, data, recipe, plan, preprocess): monkeypatch.setattr(m, 'read_header', counted)
    kw = dict(label_col='label', batch_tfms=None) if labelled else dict(codes=['background','x'], patch=8)
    data.VolumeDataLoaders.from_df(df, cache=tmp_path/'store', bs=2, num_workers=0, device='cpu', **kw)
    assert sorted(read)==sorted(map(str, [*df.image, *([] if labelled else df['mask'])]))

# --- what was found is known the second time

@pytest.fixture
def settled(monkeypatch):
    "As if every file had been written long ago"
    now = store.time.time_ns
    class Later:
        def time_ns(): return now()+10**10
    monkeypatch.setattr(store, 'time', Later)

@pytest.fixture
def opened(monkeypatch):
    "Names of the files whose header or voxels were asked for"
    names = []
    def counted(f):
        def g(fn, *args, **kwargs):
            if not isinstance(fn, list): names.append(Path(fn).name)
            return f(fn, *args, **kwargs)
        return g
    for m in (survey, io, data, recipe, plan, preprocess):
        for k in ('read_header','load_volume','load_array'):
            if hasattr(m, k): monkeypatch.setattr(m, k, counted(getattr(m, k)))
    return names

def odd_study(path):
    "Ten small scans, of which one has a label of its own, one NaN, and one a mask of another place"
    df = small_study(path, 10)
    def change(fn, f, affine=None):
        a = np.asarray(nib.load(fn).dataobj).copy()
        f(a)
        nib.save(nib.Nifti1Image(a, np.eye(4) if affine is None else affine), fn)
    def put(v): return lambda a: a.__setitem__((0,0,0), v)
    change(df['mask'][2], put(9))
    change(df.image[4], put(np.nan))
    change(df['mask'][6], put(1), np.diag([1,1,2,1.]))
    return df

def check(df, **kwargs):
    r = check_dataset(df, ['background','x'], **kwargs)
    return pd.DataFrame(r).to_dict('records'),r.facts.to_dict('records')

def test_a_second_check_reads_nothing(tmp_path, monkeypatch, settled, opened):
    df = odd_study(tmp_path)
    monkeypatch.setenv('FASTMED_CACHE', str(tmp_path/'cache'))
    first = check(df)
    assert {o['problem'] for o in first[0]}>={'unexpected label','NaN or Inf','mask spacing'} and opened
    opened.clear()
    assert repr(check(df))==repr(first) and not opened
    assert repr(check(df, tol=.1))==repr(first) and opened, 'another tolerance'
    opened.clear()
    fn,st = df['mask'][3],os.stat(df['mask'][3])
    nib.save(nib.Nifti1Image(np.full((12,)*3, 7, np.uint8), np.eye(4)), fn)
    os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns))
    again = check(df)
    assert set(opened)=={'c0003.nii'} and any(o['problem']=='unexpected label' and o['case']=='c0003' for o in again[0])
    assert repr(check(df, cache=tmp_path/'other'))==repr(again)

def test_a_check_without_a_store_and_with_a_damaged_one(tmp_path, settled, opened, monkeypatch):
    df = odd_study(tmp_path)
    cache = tmp_path/'cache'
    first = check(df, cache=cache)
    kept = sorted((cache/'facts').iterdir())
    assert len(kept)>=18 and not any('c000' in o.read_text() for o in kept), 'names of files may be those of patients'
    for i,o in enumerate(kept):
        o.write_text(['', '[1]', o.read_text().replace('"found"', '"f"'), o.read_text().replace('12', '13')][i%4])
    assert repr(check(df, cache=cache))==repr(first)
    opened.clear()
    assert repr(check(df, cache=cache))==repr(first) and not opened, 'what was damaged is written anew'
    shutil.rmtree(cache)
    assert repr(check(df, cache=cache))==repr(first) and opened
    (tmp_path/'file').touch()
    assert repr(check(df, cache=tmp_path/'file'))==repr(first), 'no folder can be made there'
    def no(*args): raise FileError('read-only')
    monkeypatch.setattr(store, '_private_folder', no)
    assert repr(check(df, cache=tmp_path/'new'))==repr(first)

def test_what_failed_once_is_tried_again(tmp_path, settled, monkeypatch):
    df = small_study(tmp_path, 3)
    real = survey.load_volume
    def fails(fn, *args, **kwargs):
        if Path(fn).name=='c0001.nii': raise OSError(errno.EMFILE, 'Too many open files')
        return real(fn, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(survey, 'load_volume', fails)
        assert any(o['problem']=='unreadable' for o in check(df, cache=tmp_path/'cache')[0])
    assert not any(o['problem']=='unreadable' for o in check(df, cache=tmp_path/'cache')[0])

def test_one_file_under_two_names(tmp_path, settled, opened):
    df = small_study(tmp_path/'a', 5)
    first = check(df, cache=tmp_path/'cache')
    opened.clear()
    (tmp_path/'b').symlink_to(tmp_path/'a')
    def other(fn): return tmp_path/'b'/Path(fn).relative_to(tmp_path/'a')
    facts = check(df.assign(image=df.image.map(other), mask=df['mask'].map(other)), cache=tmp_path/'cache')[1]
    assert not opened and facts[0]['image']==[tmp_path/'b/images/c0000.nii'] and first[1][0]['image']==[tmp_path
            /'a/images/c0000.nii']

@pytest.mark.parametrize('labelled', [False, True])
def test_a_second_from_df_reads_no_header(tmp_path, settled, opened, labelled):
    df = small_study(tmp_path, 6).assign(label=['a','b']*3)
    kw = dict(label_col='label', batch_tfms=None) if labelled else dict(codes=['background','x'], patch=8)
    def loaders():
        return data.VolumeDataLoaders.from_df(df, cache=tmp_path/'store', bs=2, num_workers=0, device='cpu', **kw)
    first = loaders()
    opened.clear()
    again = loaders()
    assert not opened
    assert again.plan==first.plan and again.preprocess.to_dict()==first.preprocess.to_dict()

# --- the whole way, with few files open

def test_more_cases_than_files_that_may_be_open(tmp_path):
    "Check, training and prediction of 40 cases, 80 files, in a process that may have 64 open"
    pytest.importorskip('resource')
    script = Path(__file__).resolve().parents[1]/'benchmarks/many.py'
    p = forked.run([script, '--cases', '40', '--files', '64', '--csv', tmp_path/'many.csv'], tmp_path, dict(os.environ))
    assert not p.returncode, p.stderr[-2000:]
    assert len((tmp_path/'many.csv').read_text().splitlines())==7
