-- Which slot the stored values are sealed under: read from the headers, nothing is opened.
SELECT s.version, s.slot_id, s.state, count(v.slot_id) AS "values"
FROM rekey.slots AS s
LEFT JOIN (SELECT rekey.slot_id(c) AS slot_id
           FROM customers,
                unnest(ARRAY[name_c, email_c, national_id_c, notes_c, salary_c]) AS c) AS v
    USING (slot_id)
WHERE s.key_name = 'pii'
GROUP BY s.version, s.slot_id, s.state
ORDER BY s.version;
