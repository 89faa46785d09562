BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE audit_log (
	id INTEGER NOT NULL, 
	at BIGINT NOT NULL, 
	actor VARCHAR(128) NOT NULL, 
	action VARCHAR(64) NOT NULL, 
	subject VARCHAR(128) NOT NULL, 
	"before" JSON, 
	"after" JSON, 
	CONSTRAINT pk_audit_log PRIMARY KEY (id)
);
CREATE TABLE keys (
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	prefix VARCHAR(16) NOT NULL, 
	limits JSON NOT NULL, 
	created_at BIGINT NOT NULL, 
	expires_at BIGINT, 
	revoked_at BIGINT, 
	replaced_by VARCHAR(64), 
	CONSTRAINT pk_keys PRIMARY KEY (id), 
	CONSTRAINT fk_keys_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id), 
	CONSTRAINT uq_keys_digest UNIQUE (digest)
);
INSERT INTO "keys" VALUES('key-0','acme','','0000000000000000000000000000000000000000000000000000000000000000','sk-x','{}',1793000000000,NULL,NULL,NULL);
INSERT INTO "keys" VALUES('key-1','acme','','0000000000000000000000000000000000000000000000000000000000000001','sk-x','{}',1793000000000,NULL,NULL,NULL);
INSERT INTO "keys" VALUES('key-2','umbrella','','0000000000000000000000000000000000000000000000000000000000000002','sk-x','{}',1793000000000,NULL,NULL,NULL);
INSERT INTO "keys" VALUES('key-3','umbrella','','0000000000000000000000000000000000000000000000000000000000000003','sk-x','{}',1793000000000,NULL,1794000000000,NULL);
CREATE TABLE plans (
	name VARCHAR(128) NOT NULL, 
	weight FLOAT NOT NULL, 
	priority INTEGER NOT NULL, 
	tenant_limits JSON NOT NULL, 
	key_limits JSON NOT NULL, 
	free_tokens BIGINT NOT NULL, 
	free_days INTEGER NOT NULL, 
	CONSTRAINT pk_plans PRIMARY KEY (name)
);
INSERT INTO "plans" VALUES('standard',1.0,0,'{"requests_per_minute": 60, "tokens_per_minute": 100000}','{}',1000000,90);
INSERT INTO "plans" VALUES('unlimited',1.0,0,'{}','{}',0,0);
CREATE TABLE prices (
	region VARCHAR(16) NOT NULL, 
	valid_from BIGINT NOT NULL, 
	currency VARCHAR(3) NOT NULL, 
	input_nanos BIGINT NOT NULL, 
	output_nanos BIGINT NOT NULL, 
	CONSTRAINT pk_prices PRIMARY KEY (region, valid_from)
);
INSERT INTO "prices" VALUES('beijing',0,'CNY',15800,12700);
INSERT INTO "prices" VALUES('singapore',0,'CNY',27962,22458);
CREATE TABLE store_state (
	id INTEGER NOT NULL, 
	revision BIGINT NOT NULL, 
	pepper_check VARCHAR(64), 
	CONSTRAINT pk_store_state PRIMARY KEY (id)
);
INSERT INTO "store_state" VALUES(1,8,NULL);
CREATE TABLE tenants (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	region VARCHAR(16) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	"plan" VARCHAR(128) NOT NULL, 
	limits JSON NOT NULL, 
	free_tokens BIGINT, 
	free_days INTEGER, 
	free_only BOOLEAN NOT NULL, 
	log_content BOOLEAN NOT NULL, 
	created_at BIGINT NOT NULL, 
	activated_at BIGINT NOT NULL, 
	CONSTRAINT pk_tenants PRIMARY KEY (id), 
	CONSTRAINT fk_tenants_plan FOREIGN KEY("plan") REFERENCES plans (name)
);
INSERT INTO "tenants" VALUES('acme','acme','beijing','active','standard','{}',NULL,NULL,0,0,1793000000000,1793000000000);
INSERT INTO "tenants" VALUES('umbrella','umbrella','beijing','active','standard','{}',NULL,NULL,0,0,1793000000000,1793000000000);
CREATE TABLE usage_records (
	request_id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	key_id VARCHAR(64) NOT NULL, 
	region VARCHAR(16) NOT NULL, 
	dialect VARCHAR(16) NOT NULL, 
	model VARCHAR(128) NOT NULL, 
	stream BOOLEAN NOT NULL, 
	audio_form VARCHAR(16) NOT NULL, 
	replica VARCHAR(128) NOT NULL, 
	opened_at BIGINT NOT NULL, 
	reported_at BIGINT NOT NULL, 
	prepared_at BIGINT, 
	first_token_at BIGINT, 
	closed_at BIGINT, 
	audio_ms BIGINT NOT NULL, 
	input_tokens BIGINT NOT NULL, 
	output_tokens BIGINT NOT NULL, 
	engine_input_tokens BIGINT NOT NULL, 
	engine_output_tokens BIGINT NOT NULL, 
	ending VARCHAR(32), 
	finish_reason VARCHAR(16), 
	billed BOOLEAN NOT NULL, 
	free_tokens BIGINT NOT NULL, 
	currency VARCHAR(3) NOT NULL, 
	input_price VARCHAR(32) NOT NULL, 
	output_price VARCHAR(32) NOT NULL, 
	amount_nanos BIGINT NOT NULL, 
	CONSTRAINT pk_usage_records PRIMARY KEY (request_id)
);
INSERT INTO "usage_records" VALUES('request-00','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1791134957596,1791134958496,1791134957696,NULL,1791134958496,15040,188,586,0,0,'finished','stop',1,0,'CNY','0.02','0.03',21340000);
INSERT INTO "usage_records" VALUES('request-01','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1791708955986,1791708956886,NULL,NULL,NULL,25440,318,460,0,0,NULL,NULL,0,0,'CNY','0.02','0.03',0);
INSERT INTO "usage_records" VALUES('request-02','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1794427632019,1794427632919,1794427632119,NULL,1794427632919,19120,239,94,0,0,'failed',NULL,0,0,'USD','1','2',0);
INSERT INTO "usage_records" VALUES('request-03','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1791172509794,1791172510694,1791172509894,NULL,1791172510694,25120,314,248,0,0,'partial',NULL,1,0,'CNY','0.0158','0.0127',8110800);
INSERT INTO "usage_records" VALUES('request-04','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1794702699277,1794702700177,1794702699377,NULL,1794702700177,29920,374,262,0,0,'disconnected',NULL,1,167,'CNY','0.0158','0.0127',6811267);
INSERT INTO "usage_records" VALUES('request-05','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1793465684038,1793465684938,1793465684138,NULL,1793465684938,25120,314,243,0,0,'partial',NULL,1,0,'USD','1','2',800000000);
INSERT INTO "usage_records" VALUES('request-06','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1794389670815,1794389671715,1794389670915,NULL,1794389671715,26240,328,458,0,0,'failed',NULL,0,0,'CNY','0.0158','0.0127',0);
INSERT INTO "usage_records" VALUES('request-07','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1795645446377,1795645447277,1795645446477,NULL,1795645447277,30560,382,123,0,0,'lost',NULL,0,0,'USD','1','2',0);
INSERT INTO "usage_records" VALUES('request-08','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1795847899944,1795847900844,1795847900044,NULL,1795847900844,6400,80,53,0,0,'partial',NULL,1,0,'CNY','0.02','0.03',3190000);
INSERT INTO "usage_records" VALUES('request-09','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1793947202496,1793947203396,1793947202596,NULL,1793947203396,13680,171,2,0,0,'finished','stop',1,0,'USD','1','2',175000000);
INSERT INTO "usage_records" VALUES('request-10','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1791279238995,1791279239895,1791279239095,NULL,1791279239895,6480,81,466,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',7198000);
INSERT INTO "usage_records" VALUES('request-11','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1796051096621,1796051097521,1796051096721,NULL,1796051097521,28800,360,308,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',9599600);
INSERT INTO "usage_records" VALUES('request-12','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1792612290054,1792612290954,1792612290154,NULL,1792612290954,28960,362,539,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',12564900);
INSERT INTO "usage_records" VALUES('request-13','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1792107382893,1792107383793,1792107382993,NULL,1792107383793,10560,132,245,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',5197100);
INSERT INTO "usage_records" VALUES('request-14','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1792149779708,1792149780608,1792149779808,NULL,1792149780608,20000,250,499,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',10287300);
INSERT INTO "usage_records" VALUES('request-15','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1791236616898,1791236617798,1791236616998,NULL,1791236617798,16560,207,305,0,0,'partial',NULL,1,147,'USD','1','2',582431641);
INSERT INTO "usage_records" VALUES('request-16','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1794684944627,1794684945527,1794684944727,NULL,1794684945527,16960,212,289,0,0,'lost',NULL,0,0,'CNY','0.02','0.03',0);
INSERT INTO "usage_records" VALUES('request-17','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1795408363940,1795408364840,NULL,NULL,NULL,10320,129,10,0,0,NULL,NULL,0,0,'USD','1','2',0);
INSERT INTO "usage_records" VALUES('request-18','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1790989911630,1790989912530,1790989911730,NULL,1790989912530,13040,163,301,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',6398100);
INSERT INTO "usage_records" VALUES('request-19','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1795699172260,1795699173160,1795699172360,NULL,1795699173160,25520,319,368,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',9713800);
INSERT INTO "usage_records" VALUES('request-20','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1795501634457,1795501635357,1795501634557,NULL,1795501635357,12080,151,3,0,0,'lost',NULL,0,0,'CNY','0.02','0.03',0);
INSERT INTO "usage_records" VALUES('request-21','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1795994959167,1795994960067,1795994959267,NULL,1795994960067,9840,123,299,0,0,'partial',NULL,1,0,'CNY','0.02','0.03',11430000);
INSERT INTO "usage_records" VALUES('request-22','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1791421323385,1791421324285,1791421323485,NULL,1791421324285,5360,67,376,0,0,'finished','stop',1,0,'CNY','0.02','0.03',12620000);
INSERT INTO "usage_records" VALUES('request-23','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1790894053372,1790894054272,1790894053472,NULL,1790894054272,16000,200,543,0,0,'failed',NULL,0,0,'CNY','0.0158','0.0127',0);
INSERT INTO "usage_records" VALUES('request-24','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1795076550489,1795076551389,1795076550589,NULL,1795076551389,17680,221,397,0,0,'partial',NULL,1,548,'CNY','0.02','0.03',1849677);
INSERT INTO "usage_records" VALUES('request-25','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1794471424047,1794471424947,1794471424147,NULL,1794471424947,16080,201,128,0,0,'disconnected',NULL,1,238,'USD','1','2',126404256);
INSERT INTO "usage_records" VALUES('request-26','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1794043957296,1794043958196,1794043957396,NULL,1794043958196,15040,188,574,0,0,'failed',NULL,0,0,'CNY','0.0158','0.0127',0);
INSERT INTO "usage_records" VALUES('request-27','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1793839088551,1793839089451,1793839088651,NULL,1793839089451,16800,210,400,0,0,'partial',NULL,1,219,'USD','1','2',647393443);
INSERT INTO "usage_records" VALUES('request-28','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1794722233184,1794722234084,1794722233284,NULL,1794722234084,6880,86,281,0,0,'finished','stop',1,12,'USD','1','2',626811990);
INSERT INTO "usage_records" VALUES('request-29','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1791925789276,1791925790176,1791925789376,NULL,1791925790176,11680,146,325,0,0,'disconnected',NULL,1,0,'CNY','0.02','0.03',12670000);
INSERT INTO "usage_records" VALUES('request-30','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1792842320565,1792842321465,1792842320665,NULL,1792842321465,21920,274,40,0,0,'finished','stop',1,0,'CNY','0.02','0.03',6680000);
INSERT INTO "usage_records" VALUES('request-31','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1793039601166,1793039602066,1793039601266,NULL,1793039602066,22240,278,563,0,0,'disconnected',NULL,1,0,'CNY','0.02','0.03',22450000);
INSERT INTO "usage_records" VALUES('request-32','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1792535041699,1792535042599,1792535041799,NULL,1792535042599,9920,124,296,0,0,'partial',NULL,1,0,'CNY','0.02','0.03',11360000);
INSERT INTO "usage_records" VALUES('request-33','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1792845768965,1792845769865,1792845769065,NULL,1792845769865,10560,132,211,0,0,'finished','stop',1,0,'USD','1','2',554000000);
INSERT INTO "usage_records" VALUES('request-34','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1790858966997,1790858967897,1790858967097,NULL,1790858967897,24560,307,585,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',12280100);
INSERT INTO "usage_records" VALUES('request-35','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1790970666499,1790970667399,1790970666599,NULL,1790970667399,22640,283,131,0,0,'disconnected',NULL,1,0,'CNY','0.0158','0.0127',6135100);
INSERT INTO "usage_records" VALUES('request-36','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1792721715391,1792721716291,1792721715491,NULL,1792721716291,23520,294,196,0,0,'finished','stop',1,308,'CNY','0.02','0.03',4368000);
INSERT INTO "usage_records" VALUES('request-37','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1792094045081,1792094045981,1792094045181,NULL,1792094045981,5520,69,508,0,0,'finished','stop',1,577,'USD','1','2',0);
INSERT INTO "usage_records" VALUES('request-38','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1793356709375,1793356710275,1793356709475,NULL,1793356710275,6480,81,96,0,0,'partial',NULL,1,140,'USD','1','2',57067797);
INSERT INTO "usage_records" VALUES('request-39','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1795487510697,1795487511597,1795487510797,NULL,1795487511597,23840,298,171,0,0,'partial',NULL,1,0,'CNY','0.02','0.03',11090000);
INSERT INTO "usage_records" VALUES('request-40','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1793729335143,1793729336043,1793729335243,NULL,1793729336043,12080,151,366,0,0,'finished','stop',1,0,'USD','1','2',883000000);
INSERT INTO "usage_records" VALUES('request-41','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1795414497616,1795414498516,1795414497716,NULL,1795414498516,25280,316,182,0,0,'finished','stop',1,0,'USD','1','2',680000000);
INSERT INTO "usage_records" VALUES('request-42','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1794266292921,1794266293821,1794266293021,NULL,1794266293821,1680,21,223,0,0,'finished','stop',1,99,'USD','1','2',277520492);
INSERT INTO "usage_records" VALUES('request-43','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1792223741875,1792223742775,NULL,NULL,NULL,30240,378,539,0,0,NULL,NULL,0,0,'CNY','0.02','0.03',0);
INSERT INTO "usage_records" VALUES('request-44','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1795911143097,1795911143997,1795911143197,NULL,1795911143997,27120,339,121,0,0,'finished','stop',1,0,'CNY','0.02','0.03',10410000);
INSERT INTO "usage_records" VALUES('request-45','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1794719698982,1794719699882,1794719699082,NULL,1794719699882,13600,170,0,0,0,'partial',NULL,1,0,'CNY','0.0158','0.0127',2686000);
INSERT INTO "usage_records" VALUES('request-46','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1791042660108,1791042661008,1791042660208,NULL,1791042661008,28000,350,556,0,0,'failed',NULL,0,0,'CNY','0.0158','0.0127',0);
INSERT INTO "usage_records" VALUES('request-47','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1795741546137,1795741547037,1795741546237,NULL,1795741547037,7680,96,215,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',4247300);
INSERT INTO "usage_records" VALUES('request-48','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1791323980702,1791323981602,1791323980802,NULL,1791323981602,24320,304,311,0,0,'finished','stop',1,0,'CNY','0.0158','0.0127',8752900);
INSERT INTO "usage_records" VALUES('request-49','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1794403271760,1794403272660,1794403271860,NULL,1794403272660,14240,178,373,0,0,'failed',NULL,0,0,'USD','1','2',0);
INSERT INTO "usage_records" VALUES('request-50','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1793832096260,1793832097160,NULL,NULL,NULL,1680,21,326,0,0,NULL,NULL,0,0,'CNY','0.02','0.03',0);
INSERT INTO "usage_records" VALUES('request-51','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1794457330950,1794457331850,1794457331050,NULL,1794457331850,2640,33,34,0,0,'finished','stop',1,0,'USD','1','2',101000000);
INSERT INTO "usage_records" VALUES('request-52','umbrella','key-3','beijing','openai','captioner',0,'url','host-1-ab',1795010193535,1795010194435,NULL,NULL,NULL,27200,340,287,0,0,NULL,NULL,0,0,'CNY','0.0158','0.0127',0);
INSERT INTO "usage_records" VALUES('request-53','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1795174810080,1795174810980,1795174810180,NULL,1795174810980,2320,29,265,0,0,'lost',NULL,0,0,'USD','1','2',0);
INSERT INTO "usage_records" VALUES('request-54','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1792661201720,1792661202620,1792661201820,NULL,1792661202620,31120,389,104,0,0,'failed',NULL,0,0,'CNY','0.02','0.03',0);
INSERT INTO "usage_records" VALUES('request-55','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1793556289320,1793556290220,1793556289420,NULL,1793556290220,29760,372,120,0,0,'finished','stop',1,466,'USD','1','2',32341464);
INSERT INTO "usage_records" VALUES('request-56','acme','key-1','beijing','openai','captioner',0,'url','host-1-ab',1795611364991,1795611365891,1795611365091,NULL,1795611365891,15920,199,380,0,0,'partial',NULL,1,0,'USD','1','2',959000000);
INSERT INTO "usage_records" VALUES('request-57','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1794685915793,1794685916693,1794685915893,NULL,1794685916693,25360,317,460,0,0,'disconnected',NULL,1,0,'CNY','0.0158','0.0127',10850600);
INSERT INTO "usage_records" VALUES('request-58','umbrella','key-2','beijing','openai','captioner',0,'url','host-1-ab',1793245550669,1793245551569,1793245550769,NULL,1793245551569,8080,101,594,0,0,'finished','stop',1,534,'CNY','0.0158','0.0127',2117232);
INSERT INTO "usage_records" VALUES('request-59','acme','key-0','beijing','openai','captioner',0,'url','host-1-ab',1793371556345,1793371557245,1793371556445,NULL,1793371557245,3280,41,134,0,0,'disconnected',NULL,1,88,'USD','1','2',153617143);
CREATE INDEX ix_audit_log_subject ON audit_log (subject);
CREATE INDEX ix_usage_records_key_id_opened_at ON usage_records (key_id, opened_at);
CREATE INDEX ix_usage_records_open ON usage_records (replica) WHERE ending IS NULL;
CREATE INDEX ix_usage_records_tenant_id_opened_at ON usage_records (tenant_id, opened_at);
CREATE INDEX ix_keys_tenant_id ON keys (tenant_id);
COMMIT;
