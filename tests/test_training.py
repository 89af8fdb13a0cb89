"""What a notebook can't tell about training: kill -9, several processes, what changed and what did not"""
import csv, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
RUN = [sys.executable, str(HERE/'training_run.py')]
ENV = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}

def run(cmd): 
    r = subprocess.run(cmd, env=ENV, capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stderr[-3000:]

def same(a, b, tol=0.):
    a, b = load_file(a), load_file(b)
    assert a.keys()==b.keys()
    worst = max((a[k].float()-b[k].float()).abs().max().item() for k in a)
    assert worst<=tol, f'weights differ by {worst}'

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole'); run([*RUN, str(out)])
    return out

def test_killed_and_resumed_ends_with_the_same_weights(whole, tmp_path):
    p = subprocess.Popen([*RUN, str(tmp_path), '--slow'], env=ENV, stderr=subprocess.DEVNULL)
    until = time.time()+120
    while not (tmp_path/'checkpoint-15').exists() and time.time()<until: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'final.safetensors').exists(), 'it finished before it was killed'
    run([*RUN, str(tmp_path)])
    same(whole/'final.safetensors', tmp_path/'final.safetensors')
    steps = [int(r['step']) for r in csv.DictReader(open(tmp_path/'log.csv'))]
    assert steps==list(range(5,41,5))

def test_two_processes_do_the_work_of_one(whole, tmp_path):
    run([sys.executable,'-m','accelerate.commands.launch','--cpu','--num_processes','2','--num_machines','1','--mixed_precision','no','--dynamo_backend','no','--main_process_port','29571',*RUN[1:],str(tmp_path)])
    same(whole/'final.safetensors', tmp_path/'final.safetensors', tol=2e-4)

def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(whole, tmp_path):
    (tmp_path/'.tmp-20').mkdir(); (tmp_path/'.tmp-20'/'model.safetensors').write_bytes(b'half')
    run([*RUN, str(tmp_path)])
    same(whole/'final.safetensors', tmp_path/'final.safetensors')
    assert not list(tmp_path.glob('.tmp-*'))
