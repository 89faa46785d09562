"""Combinations of values that users set. Each must render valid manifests on every Helm and Kubernetes."""

from __future__ import annotations

from typing import Any

EXTERNAL = {
    "postgresql": {
        "mode": "external",
        "host": "db.example.com",
        "parameters": "sslmode=verify-full",
        "passwordSecret": {"name": "db", "key": "password"},
        "networks": [{"ipBlock": {"cidr": "10.3.0.0/16"}}],
    },
    "redis": {
        "mode": "external",
        "host": "cache.example.com",
        "port": 6380,
        "tls": True,
        "passwordSecret": {"name": "cache", "key": "password"},
        "networks": [{"ipBlock": {"cidr": "10.4.0.0/16"}}],
    },
}
SOLO = {"workload": "deployment", "engine": {"replicas": {"min": 1, "max": 1}}}
SCHEDULED = {
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "captions", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}]
            }
        }
    },
    "topologySpreadConstraints": [
        {"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
    ],
    "priorityClassName": "high",
    "podLabels": {"team": "audio"},
    "podAnnotations": {"number": "1"},
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    "envFrom": [{"configMapRef": {"name": "more"}}],
    "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "volumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
}

COMBINATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "names": {"nameOverride": "cap", "fullnameOverride": "a" * 40, "commonLabels": {"team": "audio", "year": "2026"}},
    "global": {"global": {"imageRegistry": "mirror.example.com", "imagePullSecrets": ["pull"], "other": {"a": 1}}},
    "global pull secrets as maps": {"global": {"imagePullSecrets": [{"name": "pull"}]}},
    "an image by digest": {
        "image": {"registry": "r.example.com", "digest": "sha256:" + "0" * 64, "pullSecrets": ["a", "b"]}
    },
    "a tag like a number": {"image": {"tag": "1e10"}},
    "big numbers": {
        "settings": {"max_upload_bytes": 10485759, "max_url_bytes": 1073741824, "max_features_bytes": 536870912}
    },
    "settings of every kind": {
        "settings": {
            "quantization": "fp8_per_channel",
            "gpu_memory_utilization": 0.87,
            "enforce_eager": True,
            "fetch_allow": ["media.internal:9000", "10.1.0.0/16"],
            "model_aliases": ["captioner"],
            "long_tokens_per_step": 1024,
            "log_level": "debug",
            "otlp_endpoint": "http://collector.tracing:4318",
        },
        "networkPolicy": {
            "extraEgress": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 9000}]}],
            "traces": {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tracing"}}}]},
        },
    },
    "no autoscaler": {"ray": {"autoscaler": {"enabled": False}}},
    "no token, no fault tolerance": {"ray": {"tokenAuth": False, "headFaultTolerance": False}},
    "another Ray, other variables": {
        "ray": {"version": "2.61.0", "env": {"RAY_BACKEND_LOG_LEVEL": "debug", "A": 1, "B": True}}
    },
    "no upgrades": {"ray": {"upgrade": {"type": "None"}}},
    "incremental upgrades": {
        "ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade", "incremental": {"gatewayClassName": "istio"}}}
    },
    "incremental upgrades with little surge": {
        "ray": {
            "upgrade": {
                "type": "NewClusterWithIncrementalUpgrade",
                "incremental": {"gatewayClassName": "istio", "maxSurgePercent": 25, "stepSizePercent": 25},
            }
        }
    },
    "another worker group": {
        "ray": {
            "extraWorkerGroups": [
                {
                    "groupName": "more",
                    "minReplicas": 0,
                    "maxReplicas": 1,
                    "rayStartParams": {},
                    "template": {"spec": {"containers": [{"name": "ray", "image": "captioner:1"}]}},
                }
            ]
        }
    },
    "scaled from zero": {"engine": {"replicas": {"min": 0, "max": 4}, "idleTimeoutSeconds": 900}},
    "many replicas": {
        "engine": {"replicas": {"min": 8, "max": 64}, "gpus": 8},
        "frontend": {"replicas": {"min": 16, "max": 128}},
    },
    "another GPU resource": {"engine": {"gpuResource": "amd.com/gpu", "gpus": 2, "runtimeClassName": "amd"}},
    "scheduling of all": {
        "head": {k: v for k, v in SCHEDULED.items() if k != "topologySpreadConstraints"},
        "frontend": SCHEDULED,
        "engine": SCHEDULED,
    },
    "no spreading, own budgets": {
        "frontend": {"spread": False, "minAvailable": 1},
        "engine": {"spread": False, "minAvailable": 1, "replicas": {"min": 2}},
    },
    "a priority class": {"priorityClass": {"create": True, "value": 1000000, "preemptionPolicy": "Never"}},
    "an existing priority class": {"priorityClass": {"name": "system"}},
    "model in a shared claim": {"model": {"source": "pvc", "pvc": {"storageClass": "shared"}}},
    "model on an existing claim": {
        "model": {"source": "pvc", "pvc": {"existingClaim": "weights"}, "download": {"enabled": False}}
    },
    "a copy of the model for each engine": {
        "model": {"copyStorageClass": "fast", "download": {"tokenSecret": {"name": "hub"}}},
    },
    "a copy of the model for each node": {"model": {"source": "hostPath", "hostPath": {"download": True}}},
    "uploads in a shared claim": {"objectStore": {"url": ""}, "uploads": {"storage": "pvc", "storageClass": "shared"}},
    "frontends without CUDA": {
        "image": {"frontendTag": "0.1.0-frontend"},
        "admin": {"enabled": True},
        "tenants": {"list": [{"name": "a"}]},
    },
    "an image on the nodes": {"image": {"registry": "", "pullPolicy": "Never"}},
    "an image with its registry": {"image": {"registry": "", "repository": "ghcr.io/team/captioner"}},
    "model with sums, mirror and token": {
        "model": {
            "source": "pvc",
            "revision": "1" * 40,
            "checksums": {"model-00001-of-00015.safetensors": "a" * 64, "config.json": "B" * 64},
            "pvc": {"storageClass": "fast", "accessModes": ["ReadWriteOnce"]},
            "download": {
                "tokenSecret": {"name": "hub"},
                "env": [{"name": "HF_ENDPOINT", "value": "https://hub.example.com"}],
                "nodeSelector": {"pool": "cpu"},
                "tolerations": [{"operator": "Exists"}],
            },
        }
    },
    "model on the host": {"model": {"source": "hostPath", "hostPath": {"path": "/data/models"}, "sizeGiB": 64}},
    "model from an object store": {
        "model": {"source": "objectStore", "objectStore": {"path": "bucket/captioner", "secret": "store"}},
        "networkPolicy": {
            "modelSource": [{"namespaceSelector": {"matchLabels": {"name": "minio"}}}],
            "modelPort": 9000,
        },
    },
    "external stores": EXTERNAL,
    "a database by its URL": {
        "postgresql": {"mode": "external", "urlSecret": {"name": "db"}, "networks": [{"podSelector": {}}]}
    },
    "backups in a bucket": {
        "backup": {
            "storage": "objectStore",
            "objectStore": {
                "path": "bucket/backups",
                "secret": "store",
                "networks": [{"ipBlock": {"cidr": "10.6.0.0/16"}}],
                "port": 9000,
            },
            "schedule": "@daily",
            "nodeSelector": {"pool": "cpu"},
        }
    },
    "backups of an external database": EXTERNAL
    | {
        "backup": {
            "storage": "pvc",
            "pvc": {"storageClass": "slow"},
            "image": "docker.io/library/postgres:17.11",
            "volumes": SCHEDULED["volumes"],
            "volumeMounts": SCHEDULED["volumeMounts"],
        }
    },
    "no backups": {"backup": {"storage": "none"}},
    "no Redis": {"redis": {"mode": "none"}},
    "existing secrets": {"secrets": {"existingSecret": "mine", "revision": "2"}},
    "given secrets": {"secrets": {"values": {"api-keys": "sk-one,sk-two", "database-password": "p"}}},
    "tenants": {"tenants": {"list": [{"name": "acme", "plan": "standard", "region": "singapore"}, {"name": "b"}]}},
    "administration": {
        "tenants": {"list": [{"name": "a"}]},
        "admin": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"ops": "yes"}}}]},
    },
    "administration for nobody": {"admin": {"enabled": True}},
    "an Ingress": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "host": "captions.example.com",
            "tlsSecret": "tls",
            "annotations": {"a": "b"},
        }
    },
    "an Ingress of AWS": {"ingress": {"enabled": True, "controller": "alb", "host": "c.example.com"}},
    "an Ingress of another controller": {
        "ingress": {"enabled": True, "controller": "other", "host": "c.example.com", "paths": ["/v1"]}
    },
    "an HTTPRoute": {
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "gw", "namespace": "infra", "sectionName": "https"}],
            "hostnames": ["c.example.com"],
        }
    },
    "an HTTPRoute with a canary": {
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "gw"}],
            "hostnames": ["c.example.com"],
            "canary": {"service": "canary-captioner-serve-svc", "weight": 10},
        }
    }
    | EXTERNAL,
    "no network policies": {"networkPolicy": {"enabled": False}},
    "DNS of OpenShift and of the node": {
        "networkPolicy": {
            "dns": {
                "ports": [53, 5353],
                "to": [
                    {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "openshift-dns"}}},
                    {"ipBlock": {"cidr": "169.254.20.10/32"}},
                ],
            }
        }
    },
    "no downloads": {
        "networkPolicy": {"fetch": {"enabled": False}},
        "objectStore": {"networks": [{"ipBlock": {"cidr": "10.5.0.0/16"}}]},
    },
    "monitoring": {
        "monitoring": {
            "labels": {"release": "prometheus"},
            "token": True,
            "podMonitor": {"enabled": True, "interval": "30s"},
            "rules": {"enabled": True},
            "dashboards": {"enabled": True, "annotations": {"grafana_folder": "captions"}},
        }
    },
    "a short drain": {"drain": {"longestRequestSeconds": 60, "marginSeconds": 5}},
    "a day": {"drain": {"longestRequestSeconds": 86400, "marginSeconds": 600}},
    "more manifests": {
        "extraManifests": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "{{ .Release.Name }}-more"},
                "data": {"n": "{{ .Values.frontend.cpus }}"},
            },
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: text}\ndata: {}\n",
        ]
    },
    "uploads in a bucket": {
        "objectStore": {
            "url": "s3://captions/production",
            "endpoint": "https://s3.oss-cn-beijing.aliyuncs.com",
            "region": "cn-beijing",
            "virtualHost": True,
            "secret": "bucket",
            "networks": [{"ipBlock": {"cidr": "10.5.0.0/16"}}],
        }
    },
    "uploads in a bucket, by the pods' identity": {
        "objectStore": {"url": "gs://captions"},
        "serviceAccount": {"annotations": {"iam.gke.io/gcp-service-account": "captioner@p.iam.gserviceaccount.com"}},
    },
    "an identity of the cloud": {
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}}
    },
    "OpenShift's own users": {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    "the test at another URL": {
        "test": {"url": "https://captions.example.com", "keySecret": {"name": "k", "key": "k"}}
    },
    "without Ray": SOLO,
    "without Ray, on the CPU": SOLO
    | {
        "image": {"variant": "cpu"},
        "model": {"source": "embedded"},
        "engine": {"gpus": 0, "replicas": {"min": 1, "max": 1}},
        "postgresql": {"mode": "none"},
        "redis": {"mode": "none"},
        "uploads": {"storage": "emptyDir"},
    },
    "without Ray, with KEDA": {
        "workload": "deployment",
        "keda": {"enabled": True},
        "engine": {"replicas": {"min": 2, "max": 9}},
    },
    "without Ray, everything else": {
        "workload": "deployment",
        "engine": SCHEDULED,
        "model": {"source": "hostPath"},
        "deployment": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "25%"}},
        "ingress": {"enabled": True, "host": "c.example.com"},
        "monitoring": {"podMonitor": {"enabled": True}, "token": True},
        "admin": {"enabled": True},
    }
    | EXTERNAL,
    "without Ray, uploads in a bucket": {
        "workload": "deployment",
        "engine": {"replicas": {"min": 2, "max": 4}},
        "objectStore": {"url": "az://account/captions/production", "secret": "bucket"},
        "uploads": {"storage": "emptyDir"},
    },
    "without Ray, from an object store": SOLO
    | {"model": {"source": "objectStore", "objectStore": {"path": "b/p", "secret": "s"}}},
}
