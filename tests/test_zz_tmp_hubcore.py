pytest_plugins = ["tests.support.hub"]
import os
def test_up(hub_both):
    hub=hub_both
    d=os.urandom(3_000_000)
    hub.put("tester/a", {"x.safetensors": d, "README.md": "---\nlicense: mit\n---\nhi"})
    import huggingface_hub
    p=hub.api().hf_hub_download("tester/a","x.safetensors")
    assert open(p,"rb").read()==d
    assert p.startswith(str(hub.home))
    c=hub.upload("tester/b", {"x.safetensors": d})
    assert hub.head("tester/b")==c
    t=[x for x in hub.api().list_repo_tree("tester/b", recursive=True)]
    print(t)
    p=hub.api().hf_hub_download("tester/b","x.safetensors")
    assert open(p,"rb").read()==d
    print(hub.run("version").stdout)
    print([ (x["method"],x["path"]) for x in hub.log()])
