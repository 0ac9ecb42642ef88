import torch, statistics
from torch.nn import functional as F
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction=True
def t(f, n=20):
    g=torch.cuda.CUDAGraph(); f(); torch.cuda.synchronize()
    with torch.cuda.graph(g):
        for _ in range(n): f()
    ts=[]
    for _ in range(6):
        a,b=(torch.cuda.Event(enable_timing=True) for _ in range(2)); a.record(); g.replay(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b)/n*1e3)
    return statistics.median(ts[1:])
shapes={"qkv":(12288,4096),"o":(4096,4096),"gu":(22016,4096),"down":(4096,11008)}
for M in (64,128,256,512,1024,2048,4096,8192):
    tot={}
    for name,(N,K) in shapes.items():
        # several weights so that L2 does not hold them
        k=max(2,int(2e8//(N*K*2)))
        ws=[torch.randn(N,K,device="cuda",dtype=torch.bfloat16)*0.02 for _ in range(k)]
        x=torch.randn(M,K,device="cuda",dtype=torch.bfloat16)
        row=[]
        for lib in ("cublas","cublaslt"):
            torch.backends.cuda.preferred_blas_library(lib)
            out=torch.empty(M,N,device="cuda",dtype=torch.bfloat16)
            it=[0]
            def f():
                it[0]+=1; torch.mm(x, ws[it[0]%k].t(), out=out)
            us=t(f); row.append(us); tot[lib]=tot.get(lib,0)+us
            # transposed: W @ x^T
            outT=torch.empty(N,M,device="cuda",dtype=torch.bfloat16)
            def f2():
                it[0]+=1; torch.mm(ws[it[0]%k], x.t(), out=outT)
            us=t(f2); row.append(us); tot[lib+"T"]=tot.get(lib+"T",0)+us
        print(M,name,[f"{u:.1f}us {2*M*N*K/u/1e6:.0f}TF {N*K*2/u/1e6:.2f}TB/s" for u in row],flush=True)
    print(M,"sum x32 ms",{a:round(b*32/1e3,2) for a,b in tot.items()},flush=True)
