INSERT INTO search_words (rowid, name, tags, description, card) VALUES (1, 'acme ner', 'a', 'names', '');
