"What the benchmarks share: the facts of the machine, peak memory, and one way to keep a table."
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

here = Path(__file__).resolve().parent

def machine(device='cpu'):
    "CPU model, cores, threads and torch of this run, as one string; of a GPU its name before"
    try: cpu = next(o.split(':',1)[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name'))
    except (OSError, StopIteration):
        import platform
        cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    gpu = f'{torch.cuda.get_device_name(device)}, ' if torch.device(device).type=='cuda' else ''
    return f'{gpu}{cpu}, {cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}'

def wait(device):
    "Return when a GPU has done what it was told"
    if torch.device(device).type=='cuda': torch.cuda.synchronize()

def _status(key): return int(next(o for o in open('/proc/self/status') if o.startswith(key)).split()[1])*1024
def rss():
    "Bytes this process holds now"
    return _status('VmRSS:')
def peak():
    "Most bytes this process held since `reset_peak`. Not `ru_maxrss`, which a child process takes over from its parent"
    return _status('VmHWM:')
def reset_peak():
    "Let `peak` start again from what is held now"
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')

def quiet():
    "Progress bars stay off the terminal; they are still drawn, so their time counts"
    return contextlib.redirect_stdout(io.StringIO())

def child(script, *args):
    "Run a script in a fresh process; what it says goes to the terminal, and its last line, JSON, comes back"
    p = subprocess.run([sys.executable, str(script), *map(str, args)], stdout=subprocess.PIPE, text=True)
    out = p.stdout.strip().splitlines()
    if p.returncode or not out:
        sys.exit(f"{Path(script).name} {' '.join(map(str, args))}: exit {p.returncode}\n{p.stdout}")
    if out[:-1]: print('\n'.join(out[:-1]), flush=True)
    return json.loads(out[-1])

def keep(
    rows, # list of dicts
    fn,   # CSV; rows of an earlier run with the same `by` give way, others stay
    by,   # columns that name a measurement
    device='cpu' # where it ran
):
    "Print the rows as a table, and keep them in a CSV with the facts of the machine"
    df = pd.DataFrame(rows)
    print(df.to_string(index=False), flush=True)
    df['machine'] = machine(device)
    fn,by = Path(fn),[*by,'machine']
    if fn.exists():
        old = pd.read_csv(fn)
        def name(v):
            if pd.isna(v): return ''
            return f'{v:g}' if isinstance(v, (int,float)) else str(v)
        def key(d):
            return pd.Series([tuple(name(r.get(c)) for c in by) for r in d.to_dict('records')], index=d.index,
                    dtype=object)
        df = pd.concat([old[~key(old).isin(set(key(df)))], df], ignore_index=True)
    df.to_csv(fn, index=False)
