"""What checkpointing costs a training loop, beside other engines, on this machine (`ckptengine bench`).

An *engine* is one way of checkpointing (ours, a rival, none, or the raw limit); a *workload* is what is measured; a
*job* is one workload with one engine in one process.  `driver` interleaves the jobs, `worker` runs one of them.
"""
