"""Subject-grouped folds of the hippocampus cases, written to `hippocampus_folds.csv`: every benchmark on these scans
uses the same split."""
import os
import re
import sys
from pathlib import Path

import pandas as pd

here = Path(__file__).resolve().parent
fn = here/'hippocampus_folds.csv'

def hippocampus_folds(
    path=None,  # Folder in Decathlon layout; None takes `$FASTMED_DATA/hippocampus`
    n:int=5,    # Folds
    seed:int=42,
):              # DataFrame with case, subject and fold, sorted by case
    """Folds by subject. Ids 2k-1 and 2k are the two hippocampi of one scan, so that case 3 and case 4 are both of
    subject 2."""
    from sklearn.model_selection import GroupKFold
    path = Path(path or Path(os.environ['FASTMED_DATA'])/'hippocampus')
    names = sorted(o.name.split('.')[0] for o in (path/'labelsTr').glob('hippocampus_*.nii.gz'))
    df = pd.DataFrame(dict(case=names, subject=[(int(re.search(r'\d+', o)[0])+1)//2 for o in names])).sort_values(
            ['subject','case'], ignore_index=True)
    for i,(_,val) in enumerate(GroupKFold(n, shuffle=True, random_state=seed).split(df, groups=df.subject)):
        df.loc[val, 'fold'] = i
    return df.astype({'fold':int}).sort_values('case', ignore_index=True)

def split(
    fold:int=0,   # The fold that is kept back
    path=None,    # As for `hippocampus_folds`
):                # DataFrame of training cases, DataFrame of kept-back cases; columns case, subject, fold, image, mask
    "Training and kept-back cases of the stored folds, with their files"
    path = Path(path or Path(os.environ['FASTMED_DATA'])/'hippocampus')
    df = pd.read_csv(fn)
    for col,d in (('image','imagesTr'), ('mask','labelsTr')): df[col] = [str(path/d/f'{o}.nii.gz') for o in df.case]
    return df[df.fold!=fold].reset_index(drop=True), df[df.fold==fold].reset_index(drop=True)

if __name__ == '__main__':
    df = hippocampus_folds(sys.argv[1] if len(sys.argv)>1 else None)
    df.to_csv(fn, index=False)
    print(df.groupby('fold').agg(cases=('case','size'), subjects=('subject','nunique')).to_string())
