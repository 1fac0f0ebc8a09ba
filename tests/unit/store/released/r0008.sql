-- What a store of this revision has written, as it wrote it: the code of then is gone. One statement a line.
INSERT INTO feed VALUES (1, 'the-feed', 4, 0);
INSERT INTO base_models VALUES ('sha256:0000000000000000000000000000000000000000000000000000000000000000', 'tiny', 'sha256:0000000000000000000000000000000000000000000000000000000000000000', 'sha256:0000000000000000000000000000000000000000000000000000000000000000', 'Llama', 8, 2, 16, '{}', 1);
INSERT INTO adapters (id, namespace, name, version_count) VALUES (1, 'acme', 'ner', 1);
INSERT INTO versions (id, adapter_id, number, digest, tensor_digest, base_digest, base_model_id, task, description, tags, license, kind, op_kinds, max_rank, size_bytes, servable, unservable_reason, warnings, create_time_us, source_files, feed_position) VALUES (1, 1, 1, 'sha256:0000000000000000000000000000000000000000000000000000000000000000', 'sha256:0000000000000000000000000000000000000000000000000000000000000000', 'sha256:0000000000000000000000000000000000000000000000000000000000000000', 'tiny', 'ner', 'Names', '["a"]', 'mit', 'lora', '["lowrank"]', 4, 1099511627776, true, '', '[]', 5, '[{"path": "a.json", "size_bytes": 3, "digest": "sha256:0000000000000000000000000000000000000000000000000000000000000000"}]', 2);
INSERT INTO version_tags VALUES (1, 'a');
INSERT INTO alias_moves VALUES (1, 'prod', 1, 1, 6, 'ada', 'why', true, 'set');
INSERT INTO aliases VALUES (1, 'prod', 1);
INSERT INTO routes VALUES ('*', 'ner', '[{"ref": "base", "weight": 1, "cohort": ""}]', 1, 7, false);
INSERT INTO changes VALUES (1, 5, 'route_set', '{"tenant":"*","task":"x","targets":[{"ref":"base","weight":1,"cohort":""}],"generation":1,"update_time_us":1}');
INSERT INTO changes VALUES (2, 5, 'route_deleted', '{"tenant":"*","task":"x","targets":[],"generation":2,"update_time_us":2}');
INSERT INTO changes VALUES (3, 5, 'alias_set', '{"namespace":"acme","name":"ner","alias":"prod","version_number":1,"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","generation":1,"update_time_us":6,"actor":"ada","comment":"why"}');
INSERT INTO changes VALUES (4, 5, 'base_model_registered', '{"model_id":"tiny","digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","config_digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","weights_digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","architecture":"Llama","hidden_size":8,"num_layers":2,"vocab_size":16,"config_json":"{}"}');
INSERT INTO search_documents VALUES (1, 1, 4, 'sha256:0000000000000000000000000000000000000000000000000000000000000000', 'tiny', 'ner', 'lora', 'mit');
INSERT INTO search_tags VALUES (1, 'a', 4);
INSERT INTO version_statuses VALUES (1, 'deprecated', 'old', 'acme/ner:v2', 3, 8, 'ada');
INSERT INTO version_signatures VALUES (1, '[{"key_id": "ed25519:0", "signature": "00", "create_time_us": 9, "actor": ""}]');
INSERT INTO blob_removals VALUES ('sha256:1111111111111111111111111111111111111111111111111111111111111111', 'somebody', 5);
